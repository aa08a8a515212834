"""Prompts that begin alike are computed once, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import Event, Request, SamplingParams
from lifecycle.engines.windows import Windows
from lifecycle.errors import EngineError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from tests.engines.clock import StepClock
from tests.engines.conftest import Model
from tests.engines.toy import ToyEngine, continuation

CHUNK = 4
BLOCK = 8 * CHUNK
"""Bytes of the toy's chunk."""
FREE = SamplingParams(max_tokens=3, ignore_eos=True)


def toy(budget: int = 100 * BLOCK, slots: int = 3) -> ToyEngine:
    return ToyEngine.make(slots, 40, CHUNK, prefix_cache_bytes=budget)


def run(engine: ToyEngine, prompt: list[int], salt: str = "") -> tuple[list[int], int]:
    """The output of one request, and how many tokens of its prompt were computed."""
    begun = len(engine.backend.steps)
    engine.submit(Request("r", prompt, FREE, cache_salt=salt))
    output: list[int] = []
    while engine.num_running or engine.num_waiting:
        output += [e.token_id for e in engine.step() if e.token_id is not None]
    computed = sum(len(row.tokens) for rows in engine.backend.steps[begun:] for row in rows)
    return output, computed - len(output) + 1


def test_a_prompt_is_computed_once_but_for_its_last_chunk() -> None:
    engine = toy()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    first, computed = run(engine, prompt)
    assert computed == 10
    # Another ending, the same prompt, one that is all chunks, and one that ends with a chunk.
    for text, left in (([*prompt[:9], 7], 2), (prompt, 2), (prompt[:8], 4), (prompt[:5], 1)):
        output, computed = run(engine, text)
        assert computed == left
        assert output == run(toy(0), text)[0]
    assert run(engine, prompt)[0] == first
    assert engine.prefix_cache is not None and engine.prefix_cache.hit_tokens == 8 + 8 + 4 + 4 + 8


def test_what_is_computed_anew_was_not_found() -> None:
    """Where the cache is full requests leave their slots, and find their own chunks when they come back."""
    engine = ToyEngine.make(3, 40, CHUNK, prefix_cache_bytes=100 * BLOCK, kv_cache_bytes=44 * 8)
    long = SamplingParams(max_tokens=25, ignore_eos=True)
    prompts = [[n] * 3 * CHUNK for n in range(1, 4)]
    for prompt in prompts:
        engine.submit(Request(str(prompt[0]), prompt, long))
    while engine.num_running or engine.num_waiting:
        engine.step()
    assert engine.stats.preemptions > 0
    assert (engine.stats.prefix_hit_tokens, engine.stats.prefix_query_tokens) == (0, 9 * CHUNK)
    run(engine, [1] * 3 * CHUNK)
    assert engine.stats.prefix_hit_tokens == 2 * CHUNK


def test_the_first_event_says_what_was_found() -> None:
    engine = toy()
    found: list[list[int]] = []
    for _ in range(2):
        engine.submit(Request("r", [1, 2, 3, 4, 5, 6, 7, 8, 9], FREE))
        found.append([])
        while engine.num_running or engine.num_waiting:
            found[-1] += [event.cached_tokens for event in engine.step()]
    assert found == [[0, 0, 0], [8, 0, 0]]


def test_what_differs_early_shares_nothing_later() -> None:
    engine = toy()
    run(engine, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert run(engine, [2, 2, 3, 4, 5, 6, 7, 8, 9])[1] == 9


def test_salts_share_nothing() -> None:
    engine = toy()
    prompt = [1, 2, 3, 4, 5]
    assert [run(engine, prompt, salt)[1] for salt in ("", "a", "", "a", "b")] == [5, 5, 1, 1, 5]


def test_requests_of_one_moment_share_too() -> None:
    engine = toy(slots=3)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    for n in range(3):
        engine.submit(Request(str(n), [*prompt, n], FREE))
    while engine.num_running or engine.num_waiting:
        engine.step()
    rows = [row for rows in engine.backend.steps for row in rows if row.start < len(prompt)]
    assert sum(len(row.tokens) for row in rows) == len(prompt)


def test_the_budget_holds_and_ends_of_prompts_go_first() -> None:
    engine = toy(budget=3 * BLOCK)
    cache = engine.prefix_cache
    assert cache is not None
    system = [1, 2, 3, 4]
    run(engine, [*system, 5, 5, 5, 5, 9])
    for other in (6, 7, 8):
        # The system prompt was used last each time, so the others leave before it.
        assert run(engine, [*system, *[other] * 4, 9])[1] == 5
        assert cache.num_bytes <= 3 * BLOCK
    assert run(engine, [*system, *[8] * 4, 9])[1] == 1
    assert run(toy(budget=BLOCK - 1), [*system, 9])[1] == 5


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=14), min_size=1, max_size=12),
    budget=st.integers(1, 8),
)
def test_every_output_is_what_the_request_gets_alone(prompts: list[list[int]], budget: int) -> None:
    engine = toy(budget=budget * BLOCK, slots=2)
    params = SamplingParams(max_tokens=6)
    found = engine.generate(prompts, params)
    assert [list(each.token_ids) for each in found] == [continuation(p, 6) for p in prompts]


def test_adapters_share_nothing_with_each_other_or_with_none() -> None:
    engine = toy()
    numbers = iter((1, 2))
    engine.backend.adapter_slots = 2
    engine.backend.load_adapter = lambda weights: next(numbers)
    for name in ("a", "b"):
        engine.load_adapter(name, {})
    found: list[int] = []
    for name in (None, "a", "b", None, "a"):
        engine.submit(Request("r", [1, 2, 3, 4, 5], FREE, adapter=name))
        cached = 0
        while engine.num_running or engine.num_waiting:
            cached += sum(event.cached_tokens for event in engine.step())
        found.append(cached)
    assert found == [0, 0, 0, 4, 4]


def test_texts_beyond_the_first_context_share_nothing_with_short_ones() -> None:
    engine = ToyEngine.make(3, 40, CHUNK, prefix_cache_bytes=100 * BLOCK, long_context=10)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert run(engine, prompt[:5])[1] == 5
    # Grows past it with its second token: all of it is computed anew, as a long text.
    engine.submit(Request("r", prompt, FREE))
    while engine.num_running or engine.num_waiting:
        engine.step()
    anew = [r for rows in engine.backend.steps for r in rows if r.is_long and len(r.tokens) > 1]
    assert sum(len(row.tokens) for row in anew) >= 8
    begun = len(engine.backend.steps)
    long = [*prompt, 1, 1, 1]
    run(engine, long)
    starts = [row.start for rows in engine.backend.steps[begun:] for row in rows]
    assert min(starts) == 8  # What the long text before left, and nothing of the short ones.
    assert run(engine, prompt[:6])[0] == run(toy(0), prompt[:6])[0]


def test_what_is_generated_is_not_kept() -> None:
    engine = ToyEngine.make(2, 40, prefill_chunk=1, prefix_cache_bytes=100 * BLOCK)
    run(engine, [1, 2, 3])
    assert engine.prefix_cache is not None and engine.prefix_cache.num_bytes == 3 * 8


def free_toy(budget: int = 1000 * BLOCK) -> ToyEngine:
    """One whose prompts may be cut anywhere."""
    return ToyEngine.make(3, 200, 32, cuts_freely=True, prefix_cache_bytes=budget)


def test_what_prompts_have_in_common_is_computed_once() -> None:
    engine = free_toy()
    text = [1 + n * n % 7 for n in range(120)]
    assert run(engine, text[:84])[1] == 84
    other = [9] * 30
    for prompt, left in (
        (text[:84], 1),  # the last token gives the logits
        (text[:82], 1),  # the beginning of its end
        (text[:70], 6),  # too little to copy
        ([*text[:80], *other], 30),  # in common with what is no whole chunk
        ([*text[:60], *other], 30),  # in common within a whole chunk
        ([*text[:79], *other], 45),
        (text[:116], 32),
    ):
        output, computed = run(engine, prompt)
        assert computed == left
        assert output == run(free_toy(0), prompt)[0]
    assert run(engine, text[:84], "salt")[1] == 84


def test_a_conversation_that_goes_on_is_kept_once() -> None:
    engine = free_toy()
    text = [1 + n * n % 7 for n in range(40)]
    for end in (16, 24, 31, 32):
        run(engine, text[:end])
        assert engine.prefix_cache is not None and engine.prefix_cache.num_bytes == 8 * end
    # Less than what is there, and too short by itself.
    run(engine, text[:20])
    run(engine, text[:15])
    assert engine.prefix_cache.num_bytes == 8 * 32


def test_what_is_there_already_is_not_kept_again() -> None:
    engine = free_toy()
    text = [1 + n * n % 7 for n in range(32)]
    for end in range(32, 15, -1):
        run(engine, text[:end])
    assert engine.prefix_cache is not None and engine.prefix_cache.num_bytes == 8 * 32


@pytest.mark.parametrize("is_parked", [False, True])
def test_of_what_a_window_has_left_behind_no_part_is_taken(
    monkeypatch: pytest.MonkeyPatch, is_parked: bool
) -> None:
    """A long chunk is computed in pieces beside one that decodes, and its beginning given back before its end."""
    engine = ToyEngine.make(
        2, 2048, 1024, cuts_freely=True, windows=Windows([64]), prefix_cache_bytes=1 << 24,
        max_stall=2.0,
    )  # fmt: skip
    StepClock(monkeypatch).times(engine.backend, 0.02, 0.0002)
    forgotten: list[int] = []

    def forget(slot: int, count: int, before: int = 0) -> None:
        if (stop := count - 64) > 0:
            forgotten.append(stop)
            text = engine.backend.texts[slot]
            engine.backend.texts[slot] = [0] * stop + text[stop:]

    engine.backend.forget_passed = forget
    long = [1 + n * n % 7 for n in range(1000)]
    engine.submit(Request("decodes", [1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    engine.submit(Request("long", long, FREE, priority=2))
    if is_parked:
        while not forgotten:
            engine.step()
        engine.submit(Request("first", [5, 4, 3], SamplingParams(400, ignore_eos=True), priority=1))
        for _ in range(5):
            engine.step()
        assert engine.stats.preemptions == 1
        # It comes back alone, and the rest of its chunk is one step.
        engine.cancel("decodes")
        engine.cancel("first")
    while engine.num_running or engine.num_waiting:
        engine.step()
    assert forgotten
    cache = engine.prefix_cache
    assert cache is not None
    before = cache.hit_tokens
    run(engine, [*long[:200], 9, 9])
    assert cache.hit_tokens == before


def test_the_budget_holds_for_ends_of_prompts() -> None:
    engine = free_toy(budget=8 * 100)
    cache = engine.prefix_cache
    assert cache is not None
    for n in range(1, 9):
        run(engine, [n] * 50)
        assert cache.num_bytes <= 8 * 100
        assert run(engine, [n] * 50)[1] == 1
    assert run(engine, [1] * 50)[1] == 50
    cache.clear()
    assert cache.num_bytes == 0 and run(engine, [8] * 50)[1] == 50


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, 40), max_size=3).map(lambda ends: sorted({1, *ends})),
        min_size=1,
        max_size=12,
    ),
    budget=st.integers(1, 200),
)
def test_parts_of_chunks_change_no_output(prompts: list[list[int]], budget: int) -> None:
    """Prompts are made of pieces that begin alike, so that they part and meet anywhere in a chunk."""
    engine = ToyEngine.make(2, 200, 20, cuts_freely=True, prefix_cache_bytes=budget * 8)
    texts = [
        [1 + (n * k) % 3 for k, end in enumerate(ends, 1) for n in range(end)] for ends in prompts
    ]
    found = engine.generate(texts, SamplingParams(max_tokens=6))
    assert [list(each.token_ids) for each in found] == [continuation(t, 6) for t in texts]


def test_a_negative_budget_is_refused(stories: Model) -> None:
    with pytest.raises(EngineError, match="prefix_cache_bytes is -1"):
        OnnxEngine.open(stories.graph, EngineOptions(prefix_cache_bytes=-1))


def outputs(
    folder: Path, options: EngineOptions, kind: type[BatchedEngine] = OnnxEngine
) -> tuple[list[Event], int]:
    """What requests that share 70 tokens get, logits of every step with it, and how many tokens were found."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 512, 70).tolist()
    prompts = [[*shared, *rng.integers(3, 512, n).tolist()] for n in (1, 9, 40, 26, 3)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=5)
    engine = kind.open(folder, options)
    for n, prompt in enumerate(prompts):
        engine.submit(Request(str(n), prompt, params))
    events: list[Event] = []
    while engine.num_running or engine.num_waiting:
        events += [
            e._replace(cached_tokens=0, queue_seconds=None)
            for e in engine.step()
            if e.token_id is not None
        ]
    hit_tokens = engine.stats.prefix_hit_tokens
    engine.close()
    return sorted(events, key=lambda e: e.request_id), hit_tokens


@pytest.mark.parametrize(("kind", "slots"), [(OnnxEngine, 2), (TorchEngine, 1)])
def test_a_real_model_gives_the_same_bits(
    stories: Model, kind: type[BatchedEngine], slots: int
) -> None:
    """Through slots that others have used. With PyTorch, prompts that share a step are cut otherwise than
    alone, which shows in last bits."""
    folder = stories.graph if kind is OnnxEngine else stories.checkpoint
    plain = EngineOptions(slots, 256, 1, 32)
    expected, _ = outputs(folder, plain, kind)
    found, hit_tokens = outputs(folder, replace(plain, prefix_cache_bytes=1 << 24), kind)
    # 64 of the 70 shared tokens for all but the first, and 96 of none.
    assert hit_tokens == 4 * 64
    assert found == expected


@pytest.mark.parametrize("cache_type", [None, "int8"])
@pytest.mark.parametrize("scheme", [Int8Rowwise(8), Blockwise(32), Blockwise(64, bits=8)])
def test_with_our_kernels_parts_of_chunks_give_the_same_bits(
    stories: Model, tmp_path: Path, scheme: Scheme, cache_type: Literal["int8"] | None
) -> None:
    cache = None
    if cache_type is not None:
        texts = np.random.default_rng(1).integers(259, 512, (2, 64)).tolist()
        calibration = Calibration(stories.graph, texts)
        cache = calibrate_cache(calibration, DecoderInfo.load(stories.graph), cache_type)
    quantize_graph(stories.graph, tmp_path, "test", scheme, cache=cache)
    for chunk in (32, 128):
        plain = EngineOptions(2, 256, 2, chunk, kernels="native")
        expected, _ = outputs(tmp_path, plain)
        found, hit_tokens = outputs(tmp_path, replace(plain, prefix_cache_bytes=1 << 24))
        # All of them, but for those that began before the first prompt had ended.
        assert hit_tokens >= 3 * 70
        assert found == expected
