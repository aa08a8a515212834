"""Adapters are models to clients: listed, named in requests, mixed in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from serving.service import ModelCard, _load_adapter
from tests.serving.conftest import COMPANIONS
from tests.serving.test_cli import failure, serving, url_of


@pytest.fixture(scope="module")
def folder(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two slots, and two adapters beside it."""
    root = tmp_path_factory.mktemp("adapters")
    graph = root / "base"
    graph.mkdir()
    export_decoder(chat_model, graph, Cpu(), slots=(2, 4))
    for name in COMPANIONS:
        (graph / name).write_bytes((chat_model / name).read_bytes())
    layout = AdapterLayout.load(graph)
    assert layout is not None
    for n, name in enumerate(("one", "two")):
        write_random_adapter(root / name, layout, seed=n)
    return root


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[openai.OpenAI]:
    named = [f"--adapter={name}={folder / name}" for name in ("one", "two")]
    with serving(folder / "base", *named) as process:
        yield openai.OpenAI(base_url=f"{url_of(process)}/v1", api_key="-")


def test_adapters_are_listed_with_their_parent(api: openai.OpenAI) -> None:
    models = {model.id: model for model in api.models.list()}
    assert list(models) == ["base", "one", "two"]
    assert models["one"].parent == "base"
    assert models["base"].parent is None
    assert api.models.retrieve("two").id == "two"


def test_each_answers_as_the_engine_does_with_it(api: openai.OpenAI, folder: Path) -> None:
    engine = OnnxEngine.open(folder / "base")
    prompt, params = [5, 9, 300, 7], SamplingParams(max_tokens=8, ignore_eos=True)
    wanted: dict[str, list[int]] = {}
    for name in ("base", "one", "two"):
        if name != "base":
            engine.load_adapter(name, folder / name)
        engine.submit(Request(name, prompt, params, None if name == "base" else name))
        wanted[name] = []
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            assert event.token_id is not None
            wanted[event.request_id].append(event.token_id)
    tokenizer = ChatTokenizer.load(folder / "base")
    for name, tokens in wanted.items():
        answer = api.completions.create(
            model=name, prompt=prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.model == name
        assert answer.choices[0].text == tokenizer.decode(tokens)
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3


def test_chats_name_them_too(api: openai.OpenAI) -> None:
    texts = {
        name: api.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "fox"}],
            max_tokens=12,
            temperature=0,
        )
        for name in ("base", "one", "two")
    }
    assert {answer.model for answer in texts.values()} == set(texts)
    assert len({answer.choices[0].message.content for answer in texts.values()}) == 3


def test_an_unknown_one_is_answered_with_the_known(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'base', 'one', 'two'"):
        api.completions.create(model="three", prompt="fox")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--adapter", "one"], "NAME=FOLDER|invalid adapter value: 'one'"),
        (["--adapter", "one={one}", "--adapter", "one={two}"], "--adapter one is given twice"),
        (["--adapter", "base={one}"], "adapter 'base' has the name of the model"),
        (["--adapter", "x={base}"], "no PEFT adapter"),
    ],
)
def test_what_cannot_be_served(given: list[str], said: str, folder: Path) -> None:
    paths = {name: folder / name for name in ("base", "one", "two")}
    code, message = failure(folder / "base", *[text.format(**paths) for text in given])
    assert code in (1, 2)
    assert any(part in message for part in said.split("|")), message


def test_a_model_without_slots_says_so(stories_bundle: Path, folder: Path) -> None:
    code, message = failure(stories_bundle, "--adapter", f"a={folder / 'one'}")
    assert code == 1
    assert "no adapter slots" in message


def test_another_alpha_is_another_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for file in (folder / "one").iterdir():
        (tmp_path / "one" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config))
    engine, base = OnnxEngine.open(folder / "base"), ModelCard("base", True, "fp_0", 0)
    first = _load_adapter(engine, base, "first", folder / "one")
    second = _load_adapter(engine, base, "second", tmp_path / "one")
    assert first.fingerprint != second.fingerprint
