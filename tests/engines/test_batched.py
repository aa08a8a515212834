from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lifecycle.engines.requests import Event, FinishReason, Request, SamplingParams
from lifecycle.errors import EngineError, RequestError
from tests.engines.toy import EOS, VOCAB, ToyEngine, continuation, next_token

FREE = SamplingParams(max_tokens=5, ignore_eos=True)


def drain(engine: ToyEngine) -> list[Event]:
    events = engine.step()
    while engine.num_running or engine.num_waiting:
        events += engine.step()
    return events


def test_generate_continues_more_prompts_than_there_are_slots_in_their_order() -> None:
    engine = ToyEngine.make(max_num_seqs=2, max_model_len=64)
    prompts = [[1 + i % (VOCAB - 1)] * (1 + i) for i in range(12)]
    seen: list[tuple[int, int]] = []
    results = engine.generate(
        prompts, SamplingParams(max_tokens=9), on_done=lambda *counts: seen.append(counts)
    )
    assert [list(r.token_ids) for r in results] == [continuation(p, 9) for p in prompts]
    assert seen == [(done, 12) for done in range(1, 13)]
    assert engine.generate([], SamplingParams()) == []


def test_generate_takes_parameters_for_each_prompt() -> None:
    engine = ToyEngine.make()
    params = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0) for n in (1, 4)]
    results = engine.generate([[1], [1]], params)
    assert [len(r.token_ids) for r in results] == [1, 4]
    assert [len(r.logprobs) for r in results] == [1, 4]


def test_generate_leaves_nothing_behind_when_it_is_interrupted() -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    engine = ToyEngine.make()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2], [3], [4]], FREE, on_done=interrupt)
    assert engine.num_running == engine.num_waiting == 0
    assert engine.step() == []
    assert list(engine.generate([[2]], FREE)[0].token_ids)


def test_a_bad_prompt_is_refused_before_anything_runs() -> None:
    engine = ToyEngine.make()
    with pytest.raises(RequestError, match="empty"):
        engine.generate([[1], []], FREE)
    assert engine.num_waiting == 0 and engine.backend.steps == []


def test_stop_tokens_end_a_request_and_are_not_part_of_the_output() -> None:
    whole = next(text for p in range(1, VOCAB) if len(set(text := [p, *continuation([p], 20)])) > 4)
    prompt, output = whole[:1], whole[1:]
    stop = output[2]
    cut = output.index(stop)
    engine = ToyEngine.make()
    result = engine.generate([prompt], SamplingParams(stop_token_ids=frozenset({stop})))[0]
    assert result.finish_reason is FinishReason.STOP
    assert list(result.token_ids) == output[:cut]


def test_ignore_eos_goes_on_past_the_end_of_sequence() -> None:
    engine = ToyEngine.make(max_model_len=100)
    result = engine.generate([[1]], SamplingParams(max_tokens=90, ignore_eos=True))[0]
    assert len(result.token_ids) == 90 and EOS in result.token_ids


def test_a_request_ends_with_its_context() -> None:
    engine = ToyEngine.make(max_model_len=10)
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    result = engine.generate([[1] * 9, [1] * 4], params)
    assert [len(r.token_ids) for r in result] == [1, 6]
    assert {r.finish_reason for r in result} == {FinishReason.LENGTH}


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on() -> None:
    engine = ToyEngine.make(max_num_seqs=2)
    for name in "abc":
        engine.submit(Request(name, [1], FREE))
    engine.step()
    engine.backend.fail_next = True
    events = engine.step()
    assert {e.request_id for e in events} == {"a", "b"}
    assert all(e.finish_reason is FinishReason.ERROR and "gave up" in e.error for e in events)
    tokens = [e.token_id for e in drain(engine) if e.request_id == "c"]
    assert tokens == [t for t in tokens if t is not None] and len(tokens) == 5


def test_a_row_that_is_not_finite_ends_only_its_own_request() -> None:
    engine = ToyEngine.make()
    engine.backend.poison = 7
    engine.submit(Request("good", [1], FREE))
    engine.submit(Request("bad", [7], FREE))
    events = drain(engine)
    bad = [e for e in events if e.request_id == "bad"]
    assert len(bad) == 1 and bad[0].finish_reason is FinishReason.ERROR
    assert len([e for e in events if e.token_id is not None]) == 5


def test_generate_raises_what_a_step_could_not_do() -> None:
    engine = ToyEngine.make()
    engine.backend.poison = 7
    with pytest.raises(EngineError, match=r"prompt 1: .*finite"):
        engine.generate([[1], [7]], FREE)
    assert engine.num_running == 0


def test_cancelling_frees_the_slot_for_the_next_step() -> None:
    engine = ToyEngine.make(max_num_seqs=1)
    engine.submit(Request("a", [1], FREE))
    engine.submit(Request("b", [2], FREE))
    engine.step()
    engine.cancel("a")
    engine.cancel("a")
    engine.cancel("never seen")
    events = engine.step()
    assert events[0] == Event("a", finish_reason=FinishReason.CANCELLED)
    assert [e.request_id for e in events[1:]] == ["b"]
    engine.cancel("b")
    assert [e.finish_reason for e in engine.step()] == [FinishReason.CANCELLED]


def test_an_id_is_in_use_until_its_request_ends() -> None:
    engine = ToyEngine.make()
    engine.submit(Request("a", [1], FREE))
    with pytest.raises(RequestError, match="in use"):
        engine.submit(Request("a", [1], FREE))
    drain(engine)
    engine.submit(Request("a", [1], FREE))


def test_the_id_of_a_cancelled_request_is_in_use_until_its_end_is_told() -> None:
    engine = ToyEngine.make()
    engine.submit(Request("a", [1], FREE))
    engine.step()
    engine.cancel("a")
    with pytest.raises(RequestError, match="in use"):
        engine.submit(Request("a", [2], FREE))
    assert engine.step() == [Event("a", finish_reason=FinishReason.CANCELLED)]
    engine.submit(Request("a", [2], FREE))
    assert len([e for e in drain(engine) if e.token_id is not None]) == 5


def test_logits_come_after_every_token_whatever_the_chunks() -> None:
    engine = ToyEngine.make(prefill_chunk=4)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    logits = engine.logits(tokens)
    assert logits.shape == (9, VOCAB) and logits.dtype == np.float32
    assert logits.argmax(axis=1).tolist() == [next_token(tokens[: n + 1]) for n in range(9)]


@pytest.mark.parametrize("call", ["logits", "generate"])
def test_what_needs_an_idle_engine_says_so(call: str) -> None:
    engine = ToyEngine.make()
    engine.submit(Request("a", [1], FREE))
    with pytest.raises(EngineError, match="busy"):
        engine.logits([1]) if call == "logits" else engine.generate([[1]], FREE)


def test_only_requests_that_somebody_reads_hold_prompts_back(monkeypatch) -> None:
    monkeypatch.setattr(
        "lifecycle.engines.pace.Pace.prompt_room",
        lambda pace, _: pace.max_stall and 2,
    )
    prompts = [[1] * 2, [2] * 20, [3] * 20]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine = ToyEngine.make(3, 40, 20)

    def serve() -> None:
        for index, prompt in enumerate(prompts):
            engine.submit(Request(str(index), prompt, params))
        while engine.num_running or engine.num_waiting:
            engine.step()

    def steps_of(work: Callable[[], object]) -> int:
        before = engine.stats.steps
        work()
        return engine.stats.steps - before

    served = steps_of(serve)
    assert steps_of(lambda: engine.generate(prompts, params)) < served
    assert steps_of(serve) == served


def test_as_many_params_as_prompts_are_wanted() -> None:
    with pytest.raises(RequestError, match=r"2 params for 1 prompts: give one for each"):
        ToyEngine.make().generate([[1]], [FREE, FREE])


def test_a_closed_engine_refuses_requests() -> None:
    engine = ToyEngine.make()
    engine.submit(Request("a", [1], FREE))
    engine.submit(Request("cancelled", [1], FREE))
    engine.cancel("cancelled")
    engine.close()
    engine.close()
    assert engine.backend.closed and engine.num_waiting == 0 and engine.step() == []
    with pytest.raises(EngineError, match="closed"):
        engine.submit(Request("b", [1], FREE))


def test_an_engine_with_a_bounded_cache_can_be_closed() -> None:
    engine = ToyEngine.make(kv_cache_bytes=30 * 8)
    engine.submit(Request("a", [1], FREE))
    engine.step()
    engine.close()
    assert engine.backend.closed and engine.step() == []
    assert engine.stats.num_running == engine.stats.cache_capacity_bytes == 0
