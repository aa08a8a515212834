"""Beam search against transformers, and what beams do in slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.beams import Beam, BeamParams, largest
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import FinishReason, Request, SamplingParams
from lifecycle.errors import EngineError, RequestError
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.engines.conftest import Model
from tests.engines.toy import EOS, ToyEngine, next_token
from tests.graph.models import save_model

EARLY = [False, True, "never"]
SHORT = SamplingParams(max_tokens=24)


def prompts(vocab: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


def by_transformers(
    model: PreTrainedModel, prompt: list[int], beams: BeamParams, **options: Any
) -> list[tuple[list[int], float]]:
    """New tokens without their end, and score, of all beams that transformers finds."""
    generate: Any = model.generate
    ends = options.setdefault("eos_token_id", [2])
    found = generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beams.num_beams,
        num_return_sequences=beams.num_beams,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        pad_token_id=0,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    # How many tokens there are is told by the beams that they came from; padding may be a token too.
    counts = (found.beam_indices >= 0).sum(dim=1).tolist()
    texts = [
        row[len(prompt) :][:count]
        for row, count in zip(found.sequences.tolist(), counts, strict=True)
    ]
    texts = [text[:-1] if text[-1] in ends else text for text in texts]
    return list(zip(texts, found.sequences_scores.tolist(), strict=True))


def assert_same(found: Sequence[Beam], wanted: Sequence[tuple[list[int], float]]) -> None:
    assert [list(beam.token_ids) for beam in found] == [text for text, _ in wanted]
    scores = [score for _, score in wanted]
    np.testing.assert_allclose([beam.score for beam in found], scores, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.5]), min_size=1, max_size=20),
    repeats=st.integers(1, 300),
    count=st.integers(1, 40),
)
def test_the_largest_are_found_whatever_the_blocks(
    values: list[float], repeats: int, count: int
) -> None:
    array = np.array(values * repeats, np.float32)
    wanted = sorted(range(len(array)), key=lambda place: (-array[place], place))[:count]
    assert largest(array, count).tolist() == wanted


@pytest.fixture(scope="module", params=["onnxruntime", "pytorch"])
def random_engine(request: pytest.FixtureRequest, random_model: Model) -> BatchedEngine:
    options = EngineOptions(max_num_seqs=9, prefill_chunk=16)
    if request.param == "pytorch":
        return TorchEngine.open(random_model.checkpoint, options)
    return OnnxEngine.open(random_model.graph, options)


@pytest.fixture(scope="module")
def random_reference(random_model: Model) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(random_model.checkpoint)


@pytest.mark.parametrize("early_stopping", EARLY)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_beams_are_those_of_transformers(
    random_engine: BatchedEngine,
    random_reference: PreTrainedModel,
    early_stopping: Any,
    length_penalty: float,
) -> None:
    beams = BeamParams(3, length_penalty, early_stopping)
    texts = prompts(160, [1, 17, 40, 33], seed=4)
    # Many ends, so that beams do finish before the others: the model is random.
    ends = frozenset(range(20, 32))
    params = replace(SHORT, stop_token_ids=ends)
    found = random_engine.beam_search(texts, params, beams)
    reasons = {beam.finish_reason for each in found for beam in each}
    assert FinishReason.STOP in reasons
    for text, each in zip(texts, found, strict=True):
        options = {"max_new_tokens": 24, "eos_token_id": [2, *ends]}
        assert_same(each, by_transformers(random_reference, text, beams, **options))


def test_beams_of_a_trained_model_are_those_of_transformers(stories: Model) -> None:
    texts = [[1], [1, 403, 407], *prompts(512, [20, 150])]
    reference = AutoModelForCausalLM.from_pretrained(stories.checkpoint)
    engine = OnnxEngine.open(stories.graph, EngineOptions(max_num_seqs=8, prefill_chunk=32))
    beams = BeamParams(4)
    found = engine.beam_search(texts, SamplingParams(max_tokens=60), beams)
    for text, each in zip(texts, found, strict=True):
        assert_same(each, by_transformers(reference, text, beams, max_new_tokens=60))


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"min_tokens": 10}, {"min_new_tokens": 10}),
        ({"banned_token_ids": frozenset(range(60))}, {"suppress_tokens": list(range(60))}),
        ({"logit_bias": {30: 4.0, 50: -3.0}}, {"sequence_bias": [[[30], 4.0], [[50], -3.0]]}),
    ],
)
def test_penalties_bans_and_bias_are_those_of_transformers(
    random_engine: BatchedEngine,
    random_reference: PreTrainedModel,
    params: dict[str, Any],
    options: dict[str, Any],
) -> None:
    text, beams = prompts(160, [9], seed=1)[0], BeamParams(4)
    ends = frozenset({20, 21, 22})
    given = SamplingParams(max_tokens=15, stop_token_ids=ends, **params)
    found = random_engine.beam_search([text], given, beams)[0]
    options = {"max_new_tokens": 15, "eos_token_id": [2, *ends], **options}
    assert_same(found, by_transformers(random_reference, text, beams, **options))


def test_one_beam_is_greedy_decoding(random_engine: BatchedEngine) -> None:
    texts = prompts(160, [5, 30], seed=2)
    greedy = random_engine.generate(texts, SHORT)
    found = random_engine.beam_search(texts, SHORT, BeamParams(1))
    assert [beams[0].token_ids for beams in found] == [each.token_ids for each in greedy]


def test_a_prompt_gets_the_same_beams_alone_and_among_others(random_model: Model) -> None:
    engine = OnnxEngine.open(random_model.graph, EngineOptions(max_num_seqs=8, prefill_chunk=16))
    texts = prompts(160, [40, 3, 17, 90, 16], seed=3)
    seen: list[tuple[int, int]] = []
    together = engine.beam_search(
        texts, SHORT, BeamParams(4), on_done=lambda *counts: seen.append(counts)
    )
    assert together == [engine.beam_search([text], SHORT, BeamParams(4))[0] for text in texts]
    assert seen == [(done, 5) for done in range(1, 6)]
    assert engine.generate(texts[:1], SHORT)[0].token_ids


def test_a_prompt_is_computed_once_and_only_differences_are_copied() -> None:
    engine = ToyEngine.make(max_num_seqs=3, prefill_chunk=4, max_model_len=40)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    engine.beam_search([prompt], SamplingParams(max_tokens=6, ignore_eos=True), BeamParams(3))
    prefill, decode = engine.backend.steps[:3], engine.backend.steps[3:]
    assert [[len(row.tokens) for row in rows] for rows in prefill] == [[4], [4], [1]]
    assert [[len(row.tokens) for row in rows] for rows in decode] == [[1] * 3] * 5
    assert engine.backend.texts == {}


def test_the_toys_likeliest_text_is_the_best_beam() -> None:
    engine = ToyEngine.make(max_num_seqs=4, max_model_len=30)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for prompt in ([1], [2, 3], [5] * 12):
        text = list(prompt)
        for _ in range(8):
            text.append(next_token(text))
        found = engine.beam_search([prompt], params, BeamParams(2))[0]
        assert list(found[0].token_ids) == text[len(prompt) :]
        assert found[0].score > found[1].score and found[1].token_ids != found[0].token_ids


def test_a_text_that_becomes_long_is_computed_anew() -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    plain = ToyEngine.make(max_num_seqs=2, max_model_len=30)
    engine = ToyEngine.make(max_num_seqs=2, max_model_len=30, long_context=10)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    found = engine.beam_search([prompt], params, BeamParams(2))
    assert found == plain.beam_search([prompt], params, BeamParams(2))
    rows = [row for step in engine.backend.steps for row in step]
    assert {row.is_long for row in rows} == {False, True}
    assert all(row.is_long == (row.start + len(row.tokens) > 10) or row.is_long for row in rows)
    long = [row for row in rows if row.is_long]
    assert [row.start for row in long[:2]] == [0, 0], "computed from the beginning"


def test_beams_fit_into_the_budget_of_the_cache() -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    # Room for 24 tokens: one prompt with two beams at a time.
    engine = ToyEngine.make(max_num_seqs=6, max_model_len=24, kv_cache_bytes=24 * 8)
    engine.beam_search([[1, 2, 3], [4, 5, 6]], params, BeamParams(2))
    assert max(len(rows) for rows in engine.backend.steps) == 2
    with pytest.raises(RequestError, match=r"prompt 1 with 2 beams takes up to 28 .* holds 24"):
        engine.beam_search([[1], [1] * 10], params, BeamParams(2))


def test_a_beam_that_can_go_nowhere_ends_the_search() -> None:
    # Two tokens are left to a model of 17: one of them ends a beam.
    banned = frozenset(range(2, 17))
    engine = ToyEngine.make(max_num_seqs=2)
    params = SamplingParams(max_tokens=5, banned_token_ids=banned)
    found = engine.beam_search([[3]], params, BeamParams(2))[0]
    assert {set(beam.token_ids) <= {1} for beam in found} == {True} and len(found) == 2
    params = replace(params, banned_token_ids=banned | {1, EOS})
    with pytest.raises(RequestError, match="leave no token"):
        engine.beam_search([[3]], params, BeamParams(2))
    with pytest.raises(EngineError, match="prompt 0: no token may come"):
        params = replace(params, banned_token_ids=banned | {1}, min_tokens=1)
        engine.beam_search([[3]], params, BeamParams(2))


def test_what_is_not_finite_or_fails_leaves_an_idle_engine() -> None:
    engine = ToyEngine.make()
    engine.backend.poison = 7
    with pytest.raises(EngineError, match=r"prompt 1: .*finite"):
        engine.beam_search([[1], [7]], SHORT, BeamParams(1))
    engine.backend.fail_next = True
    with pytest.raises(EngineError, match="gave up"):
        engine.beam_search([[1]], SHORT, BeamParams(2))
    assert engine.backend.texts == {}
    assert engine.beam_search([[1]], SHORT, BeamParams(2))[0]


@pytest.mark.parametrize(
    ("beams", "params", "message"),
    [
        ({"num_beams": 4}, {}, "num_beams is 4, and each beam takes a slot of 3"),
        ({"num_beams": 0}, {}, "num_beams is 0; it must be"),
        ({"num_beams": True}, {}, "num_beams is True; it must be"),
        ({"length_penalty": float("nan")}, {}, "length_penalty is nan; it must be"),
        ({"length_penalty": 11}, {}, "length_penalty is 11; it must be"),
        ({"early_stopping": "always"}, {}, "early_stopping is 'always'; it must be"),
        ({"early_stopping": 1}, {}, "early_stopping is 1; it must be"),
        ({}, {"temperature": 0.7}, "temperature is 0.7; beam search takes no temperature"),
        ({}, {"logprobs": 2}, "logprobs is 2; beam search takes no logprobs"),
        ({}, {"stop_sequences": ((1,),)}, "beam search takes no stop_sequences"),
        ({}, {"max_tokens": 0}, "max_tokens is 0; it must be"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    beams: dict[str, Any], params: dict[str, Any], message: str
) -> None:
    engine = ToyEngine.make(max_num_seqs=3)
    with pytest.raises(RequestError, match=message):
        engine.beam_search([[1]], SamplingParams(**params), BeamParams(**{"num_beams": 2, **beams}))
    assert engine.backend.steps == []


def test_a_busy_engine_says_so() -> None:
    engine = ToyEngine.make()
    engine.submit(Request("a", [1], SHORT))
    with pytest.raises(EngineError, match="busy"):
        engine.beam_search([[1]], SHORT, BeamParams(2))


def test_beams_answer_with_an_adapter(tmp_path: Path) -> None:
    save_model("llama-tied", tmp_path / "hf")
    graph, adapter = tmp_path / "onnx", tmp_path / "adapter"
    graph.mkdir()
    export_decoder(tmp_path / "hf", graph, Cpu(), slots=(1, 4))
    layout = AdapterLayout.load(graph)
    assert layout is not None
    write_random_adapter(adapter, layout, seed=0)
    engine = OnnxEngine.open(graph)
    engine.load_adapter("own", adapter)
    engine.submit(Request("greedy", [1, 5], SHORT, adapter="own"))
    events = engine.step()
    while engine.num_running:
        events += engine.step()
    greedy = [event.token_id for event in events if event.token_id is not None]
    found = engine.beam_search([[1, 5]], SHORT, BeamParams(1), adapter="own")[0][0]
    assert list(found.token_ids) == greedy
    assert found != engine.beam_search([[1, 5]], SHORT, BeamParams(1))[0][0]
    with pytest.raises(EngineError, match="no adapter 'none'"):
        engine.beam_search([[1]], SHORT, BeamParams(2), adapter="none")
