"""What a request gets whose part of the cache was put aside, copied or given back is what it gets alone, to
the last bit of every log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.engines.slot_cache import SlotCache
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu
from tests.engines.conftest import Model
from tests.graph.models import SHAPE

VOCAB, WINDOW = 160, 24
"""Tokens, and how far a layer looks back."""

Bits = list[tuple[int | None, float | None, tuple[tuple[int, float], ...]]]


@pytest.fixture(scope="module", params=["float32", "int8-rowwise"])
def graph(
    request: pytest.FixtureRequest, random_model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "float32":
        return random_model.graph
    out = tmp_path_factory.mktemp("int8")
    quantize_graph(random_model.graph, out, request.param, Int8Rowwise(7))
    return out


SMALL = SHAPE | {
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "sliding_window": WINDOW,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module", params=["all", "some"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random Mistral, whose layers all have a window, and a Qwen 2, of whose layers the second has one."""
    folder = tmp_path_factory.mktemp("windowed")
    # No choice is close with it.
    torch.manual_seed(2)
    if request.param == "all":
        model = MistralForCausalLM(MistralConfig(**SMALL))
    else:
        config = Qwen2Config(**SMALL, use_sliding_window=True, max_window_layers=1)
        model = Qwen2ForCausalLM(config)
    checkpoint, graph = folder / "hf", folder / "onnx"
    model.save_pretrained(checkpoint)
    graph.mkdir()
    export_decoder(checkpoint, graph, Cpu())
    return Model(checkpoint, graph)


def texts(lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens, ignore_eos=True, logprobs=3)


def step(engine: OnnxEngine, found: dict[str, Bits], count: int = 2000) -> None:
    """Run so many steps, or until all have ended."""
    while count and (engine.num_running or engine.num_waiting):
        count -= 1
        for event in engine.step():
            bits = event.token_id, event.logprob, event.top_logprobs
            found.setdefault(event.request_id, []).append(bits)


def alone(folder: Path, options: EngineOptions, prompt: list[int], params: SamplingParams) -> Bits:
    engine, found = OnnxEngine.open(folder, options), dict[str, Bits]()
    engine.submit(Request("alone", prompt, params))
    step(engine, found)
    engine.close()
    return found["alone"]


@pytest.mark.parametrize("begun", [1, 9], ids=["in its prompt", "in its answer"])
def test_one_that_was_put_aside(graph: Path, begun: int) -> None:
    options, prompts = EngineOptions(2, prefill_chunk=16), texts([43, 43, 30, 11])
    engine, found = OnnxEngine.open(graph, options), dict[str, Bits]()
    for n in (0, 1):
        engine.submit(Request(str(n), prompts[n], greedy(20), priority=1))
    step(engine, found, begun)
    for n in (2, 3):
        engine.submit(Request(str(n), prompts[n], greedy(20)))
    step(engine, found)
    assert engine.stats.preemptions == 2
    # Nothing was computed twice.
    assert engine.stats.prompt_tokens == sum(map(len, prompts))
    for n, prompt in enumerate(prompts):
        assert found[str(n)] == alone(graph, options, prompt, greedy(20))


def test_those_with_one_prompt(graph: Path) -> None:
    options = EngineOptions(4, prefill_chunk=16)
    prompt, other = texts([43, 50])
    drawn = replace(greedy(20), temperature=1.0)
    wanted = {"0": greedy(20), "1": replace(drawn, seed=1), "2": replace(drawn, seed=2)}
    engine, found = OnnxEngine.open(graph, options), dict[str, Bits]()
    engine.submit(Request("other", other, greedy(40)))
    step(engine, found, 6)
    for id, params in wanted.items():
        engine.submit(Request(id, prompt, params))
    step(engine, found)
    assert engine.stats.prompt_tokens == len(prompt) + len(other)
    for id, params in wanted.items():
        assert found[id] == alone(graph, options, prompt, params)
    assert len({str(found[id]) for id in wanted}) == 3


def test_one_whose_beginning_was_given_back(
    windowed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others, and put aside for them once."""
    options, (prompt, short) = EngineOptions(2, 900, prefill_chunk=64), texts([310, 40])
    engine, found = OnnxEngine.open(windowed.graph, options), dict[str, Bits]()
    forgotten: list[int] = []
    honest = SlotCache.forget_passed

    def forget(cache: SlotCache, slot: int, count: int, before: int = 0) -> None:
        honest(cache, slot, count, before)
        forgotten.append(count - WINDOW)

    monkeypatch.setattr(SlotCache, "forget_passed", forget)
    engine.submit(Request("long", prompt, greedy(560), priority=1))
    for n in range(3):
        step(engine, found, 150)
        for k in range(n):
            engine.submit(Request(f"{n} {k}", short[n:], greedy(30)))
    step(engine, found)
    assert len(forgotten) > 2 and max(forgotten) > 500 and engine.stats.preemptions == 1

    monkeypatch.setattr(SlotCache, "forget_passed", lambda *_: None)
    assert found["long"] == alone(windowed.graph, options, prompt, greedy(560))
    for n, k in ((1, 0), (2, 0), (2, 1)):
        assert found[f"{n} {k}"] == alone(windowed.graph, options, short[n:], greedy(30))

    tokens = [token for token, _, _ in found["long"] if token is not None]
    text = [*prompt, *tokens[:-1]]
    logits = TorchEngine.open(windowed.checkpoint, EngineOptions(1, 900)).logits(text)
    difference = np.abs(OnnxEngine.open(windowed.graph, options).logits(text) - logits).max()
    first, second = np.sort(logits[len(prompt) - 1 :])[:, [-1, -2]].T
    assert (first - second).min() > 10 * difference, "a close choice: take another prompt"
    assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == tokens
