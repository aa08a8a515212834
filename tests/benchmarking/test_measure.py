"""The loop, on the real scheduler and a clock whose times a reader can follow."""

from __future__ import annotations

import pytest

from lifecycle.benchmarking.measure import measure
from lifecycle.errors import EngineError
from tests.benchmarking.timed import FakeClock, planned
from tests.engines.toy import ToyEngine


def test_a_closed_loop_keeps_so_many_requests_in_flight() -> None:
    engine = ToyEngine.make(max_num_seqs=2, prefill_chunk=4)
    told: list[tuple[int, int]] = []
    found = measure(
        engine,
        [planned(4, 2), planned(4, 4, first=2), planned(4, 2)],
        concurrency=2,
        clock=FakeClock(engine),
        on_done=lambda done, total: told.append((done, total)),
    )
    # A step carries one prompt, beside the tokens of those that decode.
    assert [r.token_times for r in found.records] == [[1, 2], [2, 3, 4, 5], [3, 4]]
    assert [r.arrival for r in found.records] == [0, 0, 2]
    assert [r.admitted for r in found.records] == [0, 0, 2]
    assert (found.duration, found.is_complete) == (5, True)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_requests_come_at_their_times_whether_the_engine_is_busy_or_idle() -> None:
    engine = ToyEngine.make(max_num_seqs=1, prefill_chunk=4)
    requests = [planned(4, 2, 0.0), planned(4, 2, 0.5), planned(4, 2, 10.0)]
    found = measure(engine, requests, clock=FakeClock(engine))
    first, second, third = found.records
    assert first.token_times == [1, 2]
    assert (second.arrival, second.admitted, second.token_times) == (0.5, 2, [3, 4])
    assert (third.arrival, third.admitted) == (10, pytest.approx(10))
    assert third.token_times == pytest.approx([11, 12])
    assert found.duration == pytest.approx(12)


def test_what_the_prefix_cache_had_is_counted() -> None:
    engine = ToyEngine.make(max_num_seqs=1, prefill_chunk=4, prefix_cache_bytes=1 << 20)
    found = measure(engine, [planned(9, 2), planned(9, 2)], concurrency=1)
    assert [record.cached_tokens for record in found.records] == [0, 8]


def test_a_measurement_that_is_stopped_keeps_what_it_has_and_leaves_an_idle_engine() -> None:
    engine = ToyEngine.make(max_num_seqs=1, prefill_chunk=4)
    clock = FakeClock(engine)
    found = measure(
        engine,
        [planned(4, 2), planned(4, 5), planned(4, 5)],
        concurrency=2,
        clock=clock,
        should_stop=lambda: clock.time >= 104,
    )
    assert not found.is_complete
    assert [r.is_finished for r in found.records] == [True, False, False]
    assert [r.token_times for r in found.records] == [[1, 2], [3, 4], []]
    assert (engine.num_running, engine.num_waiting, engine.step()) == (0, 0, [])


def test_a_failing_engine_is_an_error_that_leaves_it_idle() -> None:
    engine = ToyEngine.make()
    engine.backend.fail_next = True
    with pytest.raises(EngineError, match="request 0 failed: the runtime gave up"):
        measure(engine, [planned(4, 2), planned(4, 2)], concurrency=2)
    assert (engine.num_running, engine.num_waiting, engine.step()) == (0, 0, [])
