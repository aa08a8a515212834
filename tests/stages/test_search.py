"""`scheme: auto` on a real trained model, through recipes, the store and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lifecycle.cli import main
from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.errors import GateError, InterruptedRun, StageError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.kinds import OnnxModel
from lifecycle.pipeline.progress import PlainDisplay
from lifecycle.pipeline.recipe import load
from lifecycle.pipeline.runner import Runner
from lifecycle.pipeline.store import Store
from lifecycle.stages import search
from lifecycle.stages.candidates import CANDIDATES, candidates_of
from lifecycle.stages.quantize import Quantize
from lifecycle.stages.quantizing import Quantizing
from tests.docs.blocks import ROOT, blocks
from tests.workshop import Workshop, statuses

(RECIPE,) = [b.text for b in blocks(ROOT / "docs" / "quantisation.md") if b.language == "yaml"]
ONLY = "auto.candidates=[float32, int8-rowwise, {scheme: int4, block_size: 128}]"


@pytest.fixture(scope="module")
def stories(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and with texts that it wrote itself, as the recipe names them."""
    root = tmp_path_factory.mktemp("stories")
    hf, graph, texts = data_dir / "stories260K" / "hf", root / "graph", root / "texts"
    for folder in (graph, texts):
        folder.mkdir()
    export_decoder(hf, graph, Cpu())
    tokenizer = ChatTokenizer.load(hf)
    prompt = tokenizer.encode("Once upon a time")
    params = [SamplingParams(max_tokens=120, temperature=1.0, seed=seed) for seed in range(16)]
    with closing(OnnxEngine.open(graph, EngineOptions(16))) as engine:
        for i, written in enumerate(engine.generate([prompt] * len(params), params)):
            text = tokenizer.decode([*prompt, *written.token_ids])
            (texts / f"{i}.txt").write_text(text, encoding="utf-8")
    (root / "model").symlink_to(hf)
    return root


@pytest.fixture
def fresh(tmp_path: Path, stories: Path) -> Workshop:
    """The recipe of the guide beside the model and the texts."""
    for name in ("model", "texts"):
        (tmp_path / name).symlink_to(stories / name)
    found = Workshop(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return found


@pytest.fixture
def shop(fresh: Workshop, stories: Path) -> Workshop:
    """The same on a store that several tests share."""
    fresh.store_path = stories / "store"
    return fresh


def run(shop: Workshop, *overrides: str, **options: Any):
    """Run the recipe of the guide; the graph is compared with PyTorch by other tests."""
    import io

    stream = io.StringIO()
    runner = Runner(shop.store, PlainDisplay(stream))
    quick = ("onnx.no_parity=other tests do so", "auto.eval_samples=3", *overrides)
    recipe = load(str(shop.root / "recipe.yaml"), quick)
    made, shop.error = runner.run(recipe, quick, **options)
    shop.said = stream.getvalue()
    return made


def chosen_rows(table: dict[str, Any]) -> list[str]:
    return [row["name"] for row in table["candidates"] if row["chosen"]]


def test_the_guides_recipe_finds_a_model_that_holds(shop: Workshop, capsys) -> None:
    made = run(shop, ONLY.replace("]", ", {scheme: int4, method: gptq, samples: 4}]"))
    assert shop.error is None
    found = made.stages["auto"].metrics
    assert found["candidates"] == 4
    assert 0 < found["held"] < 4
    table = found["search"]
    assert chosen_rows(table) == [found["chosen"]]
    held = {row["name"]: row for row in table["candidates"] if row["holds"]}
    for row in table["candidates"]:
        assert (row["perplexity_ratio"] <= 1.02) is (row["name"] in held)
    assert found["size"] == min(row["size"] for row in held.values())
    # The figures are those of the files and of an evaluation of its own.
    folder, full = (Path(made.stages[n].path or "") for n in ("auto", "onnx"))
    assert found["size"] == pytest.approx(weights(folder) / weights(full), abs=1e-6)
    check = made.stages["check"].metrics
    assert check["perplexity_ratio"] == pytest.approx(found["perplexity_ratio"])
    page = shop.root / "page.html"
    store = ["--store", str(shop.store_path)]
    assert main(["runs", "show", made.run, "--html", str(page), *store]) == 0
    html = page.read_text()
    assert html.count('<circle class="ring"') == 1
    assert html.count("<circle cx") == 4
    assert "size of the weights, MB" in html and "bound perplexity_ratio &lt;= 1.02" in html
    capsys.readouterr()
    main(["runs", "show", made.run, *store])
    said = capsys.readouterr().out
    assert f"{found['held']} of 4 candidates hold" in said
    assert said.count("→") == 1


def weights(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def test_a_search_is_cached_and_its_candidates_are_those_of_a_recipe(fresh: Workshop) -> None:
    first = run(fresh, ONLY, until="auto")
    assert statuses(run(fresh, ONLY, until="auto")).endswith("auto=cached")
    again = run(fresh, ONLY, until="auto", force=["auto"])
    assert fresh.said.count(": quantize cached") == 2
    assert fresh.said.count(": evaluate cached") == 3
    # What a clock says is no part of the bytes: the same choice is the same artifact.
    assert again.stages["auto"].digest == first.stages["auto"].digest
    with (fresh.root / "recipe.yaml").open("a") as file:
        file.write("  plain: {use: quantize, model: onnx, scheme: int8-rowwise}\n")
    plain = run(fresh, ONLY, until="plain").stages["plain"]
    assert plain.status == "cached"
    files = [
        Path(folder or "") / "model.onnx.data" for folder in (plain.path, first.stages["auto"].path)
    ]
    assert first.stages["auto"].metrics["chosen"] == "int8-rowwise"
    assert files[0].read_bytes() == files[1].read_bytes()
    choice = json.loads((files[1].parent / search.FILE).read_text())
    assert chosen_rows(choice) == ["int8-rowwise"]
    assert "speed" not in choice["candidates"][0] and "auto" not in json.dumps(choice)


def test_another_bound_measures_only_what_a_clock_says(fresh: Workshop) -> None:
    run(fresh, ONLY, until="auto")
    made = run(fresh, ONLY, 'auto.bound={kl: "<= 1"}', until="auto")
    assert made.stages["auto"].metrics["chosen"] == "int4, block_size 128"
    assert fresh.said.count(": quantize cached") == 2
    assert fresh.said.count(": evaluate cached") == 3


def test_an_interrupted_search_goes_on_where_it_was(fresh: Workshop, monkeypatch) -> None:
    real, calls = Quantizing.run, []

    def stop_at_second(self: Quantizing) -> Any:
        calls.append(self._stage.scheme)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Quantizing, "run", stop_at_second)
    assert statuses(run(fresh, ONLY, until="auto")).endswith("auto=failed")
    assert isinstance(fresh.error, InterruptedRun)
    assert calls == ["int8-rowwise", "int4"]
    assert main(["gc", "--store", str(fresh.store_path)]) == 0
    assert run(fresh, ONLY, until="auto").status == "ok"
    assert calls == ["int8-rowwise", "int4", "int4"]


def test_where_none_holds_nothing_is_made(shop: Workshop) -> None:
    lists = "auto.candidates=[int8-rowwise, {scheme: int4, block_size: 128}]"
    made = run(shop, lists, 'auto.bound={kl: "<= 1e-9", size: "<= 0.9"}', until="auto")
    assert isinstance(shop.error, GateError)
    said = str(shop.error)
    assert "none of the 2 candidates holds the bound (kl <= 1e-9, size <= 0.9)" in said
    lines = said.splitlines()
    assert "int8-rowwise: kl is 0.00" in lines[1] and lines[1].endswith("(nearest)")
    assert "bound <= 1e-9, size is 0.3" in lines[1] and "nearest" not in lines[2]
    state = made.stages["auto"]
    assert state.digest is None and made.stages["auto"].status == "failed"
    assert len(state.metrics["search"]["candidates"]) == 2
    page = shop.root / "page.html"
    main(["runs", "show", made.run, "--html", str(page), "--store", str(shop.store_path)])
    assert page.read_text().count("<circle cx") == 2


def test_what_cannot_be_made_is_left_out_or_named(shop: Workshop) -> None:
    many = "auto.samples=5000"
    made = run(shop, many, until="auto")
    assert made.stages["auto"].metrics["candidates"] == len(CANDIDATES) - 4
    left_out = made.stages["auto"].metrics["search"]["left_out"]
    assert all("method gptq" in name for name in left_out) and len(left_out) == 4
    assert all("'texts' has" in reason for reason in left_out.values())
    run(shop, many, "auto.candidates=[{scheme: int4, method: gptq}]", until="auto")
    assert isinstance(shop.error, StageError)
    assert "candidate int4, method gptq: 'texts' has" in str(shop.error)


def test_throughput_is_measured_in_batches(shop: Workshop) -> None:
    made = run(shop, ONLY, "auto.objective=throughput", "auto.batch=3", until="auto")
    table = made.stages["auto"].metrics["search"]
    assert table["batch"] == 3
    assert all(row["tokens_per_second"] > 0 for row in table["candidates"])
    assert table["candidates"][0]["speed"] == 1


def test_the_command_prints_the_table(shop: Workshop) -> None:
    command = [sys.executable, "-m", "lifecycle.cli", "run", "recipe.yaml", "--until", "auto"]
    command += ["onnx.no_parity=other tests do so", "auto.eval_samples=3", ONLY]
    environment = os.environ | {"LIFECYCLE_STORE": str(shop.store_path)}
    run_in = {"cwd": shop.root, "env": environment, "capture_output": True, "text": True}
    said = subprocess.run(command, check=True, **run_in).stdout
    assert "perplexity_ratio <= 1.02" in said and "→ 2" in said
    answer = subprocess.run([*command, "--json"], check=True, **run_in).stdout
    found = json.loads(answer)["stages"]["auto"]["metrics"]["search"]
    assert chosen_rows(found) == ["int8-rowwise"]


SEARCH = {"model": "onnx", "scheme": "auto", "data": "text", "bound": {"kl": "<= 0.01"}}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data": None}, "scheme auto needs 'data'"),
        ({"bound": {}}, r"bound: scheme auto needs a bound on what may be lost, such as \{perp"),
        ({"bound": {"size": "<= 1"}}, "needs a bound on what may be lost"),
        ({"bound": {"kk": "<= 1"}}, "bound: unknown metric 'kk'"),
        ({"bound": {"kl": 0.01}}, "'kl': 0.01 does not say.*write '<= 0.01'"),
        ({"candidates": []}, "candidates: the list is empty"),
        ({"candidates": ["int5"]}, r"candidates\.0: scheme: unknown scheme 'int5'.*int4"),
        (
            {"candidates": ["int4", {"scheme": "int4", "blocksize": 32}]},
            r"candidates\.1: blocksize: unknown key 'blocksize'; did you mean 'block_size'",
        ),
        ({"candidates": [{"scheme": "int4", "block_size": 48}]}, r"candidates\.0: block_size: 48"),
        ({"candidates": [{"block_size": 32}]}, r"candidates\.0: scheme: 'scheme' is missing"),
        ({"candidates": ["auto"]}, "cannot be its own candidate"),
        ({"candidates": [{"scheme": "int4", "batch": 1}]}, "'batch' is set beside 'candidates'"),
        ({"method": "gptq"}, "for the schemes int4, int8 and mixed, not for int8-rowwise"),
        ({"scheme": "int4"}, "'bound' is for scheme auto, not for int4"),
        ({"calibrate": "entropy"}, "calibrate is for int8-static, and no candidate is one"),
        ({"weight_bits": 7, "candidates": ["int8"]}, "weight_bits is for .* no candidate is one"),
    ],
)
def test_settings_that_cannot_be_searched(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Quantize.model_validate({**SEARCH, **settings})


def test_settings_hold_for_all_candidates_and_calibrate_those_that_need_it() -> None:
    stage = Quantize.model_validate({**SEARCH, "skip": ["*.o_proj"], "samples": 7})
    found = {c.name: c.stage for c in candidates_of(stage)}
    assert len(found) == len(CANDIDATES)
    made = [candidate for candidate in found.values() if candidate is not None]
    assert len(made) == len(found) - 1
    assert all(c.skip == ("*.o_proj",) for c in made)
    assert {(c.method, c.samples) for c in made} == {("rtn", 128), ("gptq", 7)}
    assert {c.calibration for c in made if c.method == "rtn"} == {None}
    assert {c.calibration for c in made if c.method == "gptq"} == {"text"}
    other = Quantize.model_validate({**SEARCH, "calibration": "more"})
    assert "more" in {c.stage.calibration for c in candidates_of(other) if c.stage}


def test_what_is_said_of_some_schemes_holds_for_the_candidates_that_have_it() -> None:
    stage = Quantize.model_validate({**SEARCH, "weight_bits": 7, "int8": ["lm_head", "*.o_proj"]})
    made = [found.stage for found in candidates_of(stage) if found.stage is not None]
    assert {(c.scheme, c.weight_bits) for c in made} == {
        ("int8-rowwise", 7),
        ("int4", 7),
        ("int8", None),
    }
    assert {c.int8 for c in made if c.scheme == "int8"} == {("lm_head",)}
    assert ("lm_head", "*.o_proj") in {c.int8 for c in made if c.scheme == "int4"}


def test_equal_candidates_are_tried_once() -> None:
    twice = ["int4", {"scheme": "int4", "block_size": 64}, "float32", {"scheme": "float32"}]
    stage = Quantize.model_validate({**SEARCH, "candidates": twice})
    assert [c.name for c in candidates_of(stage)] == ["int4", "float32"]


def test_names_of_candidates_spell_values_as_recipes_do() -> None:
    listed = [{"scheme": "int4", "method": "hqq", "symmetric": False, "skip": ["lm_head"]}]
    (found,) = candidates_of(Quantize.model_validate({**SEARCH, "candidates": listed}))
    assert found.name == "int4, method hqq, symmetric false, skip [lm_head]"


def test_a_quantised_model_is_refused(shop: Workshop) -> None:
    text = RECIPE.replace("model: onnx", "model: small", 1)
    (shop.root / "recipe.yaml").write_text(
        text + "  small: {use: quantize, model: onnx, scheme: int8-rowwise}\n"
    )
    run(shop, until="auto")
    assert "'small' is quantised already (int8-rowwise)" in str(shop.error)


def test_what_is_made_is_a_model(shop: Workshop) -> None:
    made = run(shop, ONLY, until="auto")
    artifact = Store.open(shop.store_path).artifact(made.stages["auto"].digest or "", OnnxModel)
    with closing(OnnxEngine.open(artifact.path)) as engine:
        (answer,) = engine.generate([[1, 403, 407]], SamplingParams(max_tokens=4))
    assert len(answer.token_ids) == 4
