"""A second model guesses, and what comes out stays."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lifecycle.engines import asking, speculation
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.draft_model import Draft, DraftModel
from lifecycle.engines.draft_pair import check_pair
from lifecycle.engines.native import Kernels
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pace import Pace
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import Generation, Request, SamplingParams
from lifecycle.engines.windows import Windows
from lifecycle.errors import EngineError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import KvType, calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from tests.engines.clock import StepClock
from tests.engines.conftest import Model, exported
from tests.engines.toy import VOCAB, ToyBackend, ToyEngine, next_token


def test_a_failing_draft_model_ends_no_request(
    always: None, caplog: pytest.LogCaptureFixture
) -> None:
    guesser = ToyBackend()
    engine = ToyEngine.make(2, 64, draft=Draft(guesser, 64), draft_tokens=3)
    for n in (1, 2):
        engine.submit(Request(str(n), [n], SamplingParams(max_tokens=50, ignore_eos=True)))
    guesser.fail_next = True
    tokens: dict[str, list[int | None]] = {"1": [], "2": []}
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            tokens[event.request_id].append(event.token_id)
    assert all(len(found) == 50 and None not in found for found in tokens.values())
    assert not guesser.fail_next and not guesser.texts
    assert "the draft model is not asked any more: the runtime gave up" in caplog.text


def test_closing_the_engine_closes_the_draft_model() -> None:
    guesser = ToyBackend()
    ToyEngine.make(draft=Draft(guesser, 24), draft_tokens=3).close()
    assert guesser.closed


def test_its_cache_is_counted_and_given_back(always: None) -> None:
    guesser = ToyBackend()
    engine = ToyEngine.make(1, 64, draft=Draft(guesser, 64), draft_tokens=3)
    engine.submit(Request("r", [5, 6], SamplingParams(max_tokens=60, ignore_eos=True)))
    most = 0
    while engine.num_running or engine.num_waiting:
        engine.step()
        held = sum(map(len, guesser.texts.values()))
        assert engine.stats.draft_cache_bytes == held * guesser.bytes_per_token
        most = max(most, held)
    assert most > 10 and engine.stats.draft_cache_bytes == 0


def test_what_is_behind_the_window_is_given_back(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where accepted guesses jump over the moment at which it is looked at."""
    choose, steps = speculation.choose_lengths, itertools.count()

    def now_and_then(*args: Any) -> tuple[list[int], float]:
        lengths, saved = choose(*args)
        return (lengths if next(steps) % 4 == 0 else [0] * len(lengths)), saved

    monkeypatch.setattr(speculation, "choose_lengths", now_and_then)
    draft = Draft(ToyBackend(), 1500)
    engine = ToyEngine.make(1, 1500, windows=Windows([40]), draft=draft, draft_tokens=5)
    engine.submit(Request("r", [5], SamplingParams(max_tokens=1400, ignore_eos=True)))
    held = 0
    while engine.num_running or engine.num_waiting:
        if 0 in engine.backend.texts:
            kept = len(engine.backend.texts[0]) - max(engine.backend.passed.get(0, 0) - 40, 0)
            held = max(held, kept)
        engine.step()
    assert 40 <= held < 40 + 16 + 2 * 6


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses take no time, so that as many are made as may be."""
    StepClock(monkeypatch)
    monkeypatch.setattr(Pace, "decode_seconds", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(DraftModel, "ask_seconds", lambda self, num_requests: 0.0)
    monkeypatch.setattr(asking, "_LONGEST_REST", 0)


REQUESTS = [
    ([1], SamplingParams(max_tokens=120, ignore_eos=True)),
    ([1, 403, 407], SamplingParams(max_tokens=90, temperature=1.0, seed=5)),
    ([1, 400], SamplingParams(max_tokens=150, temperature=0.8, top_p=0.9, seed=6, ignore_eos=True)),
    ([1] * 70, SamplingParams(max_tokens=60, temperature=0.7, top_k=20, seed=7, logprobs=2)),
    ([1, 300, 20], SamplingParams(max_tokens=70, repetition_penalty=1.3, min_tokens=50)),
    ([1, 9], SamplingParams(max_tokens=100, temperature=1.2, seed=8, presence_penalty=0.5)),
]


def run(engine: BatchedEngine) -> list[Generation]:
    """The answers to `REQUESTS`, without the last bits of their log-probabilities."""
    prompts, params = zip(*REQUESTS, strict=True)
    return [replace(one, logprobs=()) for one in engine.generate(prompts, list(params))]


TEXTS = np.random.default_rng(0).integers(259, 512, (24, 120)).tolist()


def check_guesses_change_nothing(model: Path, draft: Path, kernels: Kernels) -> None:
    """Rounded activations would make other tokens of other last bits: of some hundred, one."""
    prompts = [[1, *text[:3]] for text in TEXTS]
    params = SamplingParams(max_tokens=120, temperature=0.7, seed=4, ignore_eos=True)
    options = EngineOptions(8, kernels=kernels)
    plain = OnnxEngine.open(model, options).generate(prompts, params)
    options = replace(options, draft_tokens=4, draft_model=draft)
    engine = OnnxEngine.open(model, options)
    assert [one.token_ids for one in engine.generate(prompts, params)] == [
        one.token_ids for one in plain
    ]
    assert engine.stats.accepted_tokens > 500


@pytest.mark.parametrize("most_scores", [1 << 30, 0])
@pytest.mark.parametrize("scheme", [Int8Rowwise(8), Blockwise(32)])
def test_no_guess_changes_a_bit_with_a_cache_of_integers(
    always: None,
    stories: Model,
    tmp_path: Path,
    scheme: Scheme,
    most_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lifecycle.engines.ort._MOST_SCORES", most_scores)
    info = DecoderInfo.load(stories.graph)
    cache = calibrate_cache(Calibration(stories.graph, TEXTS[:4]), info, "int8")
    quantize_graph(stories.graph, tmp_path, "test", scheme, cache=cache)
    check_guesses_change_nothing(tmp_path, stories.graph, "onnxruntime")


@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("scheme", [Int8Rowwise(8), Blockwise(32), Blockwise(64), Blockwise(128)])
def test_no_guess_changes_a_bit_with_our_kernels(
    always: None, stories: Model, tmp_path: Path, scheme: Scheme, kv_dtype: KvType | None
) -> None:
    info = DecoderInfo.load(stories.graph)
    cache = kv_dtype and calibrate_cache(Calibration(stories.graph, TEXTS[:4]), info, kv_dtype)
    quantize_graph(stories.graph, tmp_path, "test", scheme, cache=cache)
    check_guesses_change_nothing(tmp_path, stories.graph, "native")


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model with the vocabulary of stories260K."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=100,
    )  # fmt: skip
    return exported(LlamaForCausalLM(config), tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="session")
def pruned(stories: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """stories260K without its last layer."""
    model = LlamaForCausalLM.from_pretrained(stories.checkpoint)
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1
    model.config.layer_types = None
    return exported(model, tmp_path_factory.mktemp("pruned"))


@pytest.mark.parametrize("kind", ["stories", "pruned", "noise"])
def test_the_output_is_the_same(
    stories: Model, request: pytest.FixtureRequest, always: None, kind: str
) -> None:
    draft: Model = request.getfixturevalue(kind)
    expected = run(OnnxEngine.open(stories.graph, EngineOptions(3)))
    for draft_tokens in (1, 4):
        options = EngineOptions(3, draft_tokens=draft_tokens, draft_model=draft.graph)
        engine = OnnxEngine.open(stories.graph, options)
        assert run(engine) == expected
        stats = engine.stats
        assert stats.draft_tokens > 100
        share = stats.accepted_tokens / stats.draft_tokens
        low, high = {"stories": (0.9, 1.0), "pruned": (0.02, 0.9), "noise": (0.0, 0.3)}[kind]
        assert low <= share <= high


@pytest.mark.parametrize("engine_class", [OnnxEngine, TorchEngine])
def test_a_model_is_right_about_itself(
    stories: Model, always: None, engine_class: type[BatchedEngine]
) -> None:
    """Drawn tokens too: the guess is drawn with the same random number."""
    folder = stories.graph if engine_class is OnnxEngine else stories.checkpoint
    params = [
        SamplingParams(max_tokens=50, temperature=n / 4, seed=n, ignore_eos=True) for n in range(4)
    ]
    texts: list[list[Generation]] = []
    for options in (EngineOptions(4), EngineOptions(4, draft_tokens=4, draft_model=folder)):
        with closing(engine_class.open(folder, options)) as engine:
            texts.append(engine.generate([[1, 403 + n] for n in range(4)], params))
            stats = engine.stats
    assert texts[0] == texts[1]
    assert stats.draft_tokens > 100
    assert stats.accepted_tokens >= 0.98 * stats.draft_tokens


def test_tokens_are_drawn_as_often_as_they_are_likely(always: None) -> None:
    """Chi-square over many seeds, though the draft model thinks something else likely."""
    guesser = ToyBackend(agreement=0.0)
    engine = ToyEngine.make(1, 16, draft=Draft(guesser, 16), draft_tokens=3)
    count = 1500
    params = [
        SamplingParams(max_tokens=3, temperature=0.7, seed=seed, ignore_eos=True)
        for seed in range(count)
    ]
    found = engine.generate([[1, 2, 3]] * count, params)
    assert engine.stats.draft_tokens > count / 2
    weights = np.ones(VOCAB)
    weights[next_token([1, 2, 3])] = np.exp(1 / 0.7)
    for place in range(3):
        if place:
            # The likeliest token depends on the ones before it: count it alone.
            likely = [
                one.token_ids[place] == next_token([1, 2, 3, *one.token_ids[:place]])
                for one in found
            ]
            chance = weights.max() / weights.sum()
            observed, expected = [sum(likely)], [count * chance]
            observed.append(count - observed[0])
            expected.append(count - expected[0])
            limit = 10.83
        else:
            tokens = [one.token_ids[0] for one in found]
            observed = np.bincount(tokens, minlength=VOCAB).tolist()
            expected = (count * weights / weights.sum()).tolist()
            limit = 39.25
        # One of a thousand lies above the limit by chance; the seeds are fixed.
        assert sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)) < limit


def test_another_vocabulary_is_refused(stories: Model, random_model: Model) -> None:
    options = EngineOptions(draft_tokens=4, draft_model=random_model.graph)
    with pytest.raises(
        EngineError, match=r"vocabulary of 160 tokens, the model .* one of 512"
    ) as e:
        OnnxEngine.open(stories.graph, options)
    assert str(random_model.graph) in str(e.value) and str(stories.graph) in str(e.value)
    options = EngineOptions(draft_tokens=4, draft_model=random_model.checkpoint)
    with pytest.raises(EngineError, match=r"vocabulary of 160 tokens, the model .* one of 512"):
        TorchEngine.open(stories.checkpoint, options)


def test_another_tokenizer_is_refused_and_another_template_is_not(tmp_path: Path) -> None:
    folders = [tmp_path / "model", tmp_path / "draft"]
    tokenizer: dict[str, Any] = {
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<end>"}],
        "model": {"type": "BPE", "vocab": {"a": 1, "b": 2}},
    }

    def write(folder: Path, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **changes}))

    def check() -> None:
        check_pair(folders[0], 3, folders[1], 3)

    write(folders[0])
    check()
    write(folders[1], padding={"length": 8})
    check()
    write(folders[1], model={"type": "BPE", "vocab": {"b": 1, "a": 2}})
    with pytest.raises(EngineError, match=r"draft has another tokenizer .*model: .* in 'model'"):
        check()
    write(folders[1], added_tokens=[{"id": 0, "content": "<stop>"}])
    with pytest.raises(EngineError, match=r"differ in 'added_tokens'"):
        check()
    (folders[1] / "tokenizer.json").write_text("[")
    with pytest.raises(EngineError, match=r"draft/tokenizer.json is damaged"):
        check()


def test_a_draft_model_that_may_not_guess_or_is_none_is_refused(
    stories: Model, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"draft_tokens is 0, .* set draft_tokens"):
        OnnxEngine.open(stories.graph, EngineOptions(draft_model=stories.graph))
    for engine, folder in ((OnnxEngine, stories.graph), (TorchEngine, stories.checkpoint)):
        with pytest.raises(EngineError, match=str(tmp_path)):
            engine.open(folder, EngineOptions(draft_tokens=2, draft_model=tmp_path))
