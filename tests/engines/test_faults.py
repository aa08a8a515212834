"""Faults of the runtime end the requests that they concern, or cost time; the others never notice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.watched import Watched, WatchedEngine
from lifecycle.engines.backend import CacheBackend, Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort_binding import Binding
from lifecycle.engines.requests import Event, FinishReason, Request, SamplingParams
from lifecycle.engines.scheduler import Scheduler
from lifecycle.errors import EngineError
from tests.engines.conftest import Model

FREE = SamplingParams(max_tokens=12, ignore_eos=True)
CHUNK, SLOTS = 16, 3


class Faulty(Watched):
    """The real backend; the call of `name` with the number `at` fails after it has done its work, from
    which nobody may profit."""

    name, at, error = "", 0, Exception()
    poison: int | None = None
    """The slot whose logits become NaN at that call of `forward`."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self.fail(found) if name == super().__getattribute__("name") else found

    def fail(self, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = method(*arguments)
            self.at -= 1
            if self.at == 0 and self.poison is None:
                raise self.error
            if self.at == 0:
                return self.poisoned(arguments[0], result)
            return result

        return call

    def poisoned(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        begin = 0
        for row in rows:
            if row.slot == self.poison:
                logits[begin : begin + row.num_logits] = np.nan
            begin += row.num_logits
        return logits


class FaultyEngine(WatchedEngine):
    def watch(self, backend: CacheBackend) -> Faulty:
        return Faulty(backend)


def open_engine(model: Model, slots: int = SLOTS) -> FaultyEngine:
    options = EngineOptions(slots, 128, 1, CHUNK, prefix_cache_bytes=1 << 20)
    return FaultyEngine.open(model.graph, options)


def texts(count: int, length: int = 20) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, 160, (count, length)).tolist()


def finish(engine: FaultyEngine) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event)
    return found


def output(events: list[Event]) -> tuple[int, ...]:
    return tuple(event.token_id for event in events if event.token_id is not None)


def expect_nothing_held(engine: FaultyEngine) -> None:
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.cache_tokens) == (0, 0, 0)
    assert not any(engine.watched.held.values()), "a slot was not given back"


@pytest.mark.parametrize("error", [EngineError("the provider is gone"), MemoryError()])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_step_that_fails_ends_only_its_own(
    random_model: Model, at: int, error: Exception
) -> None:
    engine, prompts = open_engine(random_model), texts(5)
    wanted = [result.token_ids for result in engine.generate(prompts, FREE)]
    faulty = engine.watched
    assert isinstance(faulty, Faulty)
    faulty.name, faulty.at, faulty.error = "forward", at, error
    for n, prompt in enumerate(prompts):
        engine.submit(Request(str(n), prompt, FREE))
    found = finish(engine)
    assert len(found) == 5
    failed = {n for n, events in found.items() if events[-1].finish_reason is FinishReason.ERROR}
    assert 1 <= len(failed) <= SLOTS
    for n, events in found.items():
        whole = wanted[int(n)]
        if n in failed:
            assert events[-1].error in ("the provider is gone", "no memory for the step")
            assert output(events) == whole[: len(events) - 1]
        else:
            assert output(events) == whole
    expect_nothing_held(engine)
    assert [result.token_ids for result in engine.generate(prompts, FREE)] == wanted


def test_a_row_that_is_not_finite_ends_only_its_own(random_model: Model) -> None:
    engine, prompts = open_engine(random_model), texts(3)
    wanted = [result.token_ids for result in engine.generate(prompts, FREE)]
    faulty = engine.watched
    assert isinstance(faulty, Faulty)
    faulty.name, faulty.at, faulty.poison = "forward", 8, 1
    for n, prompt in enumerate(prompts):
        engine.submit(Request(str(n), prompt, FREE))
    found = finish(engine)
    ends = [found[str(n)][-1] for n in range(3)]
    assert [end.finish_reason is FinishReason.ERROR for end in ends] == [False, True, False]
    assert "not a finite number" in ends[1].error
    assert [output(found[n]) for n in ("0", "2")] == [wanted[0], wanted[2]]
    expect_nothing_held(engine)


@pytest.mark.parametrize("error", [EngineError("the provider is gone"), MemoryError()])
@pytest.mark.parametrize("name", ["read_cache", "write_cache", "copy_cache"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_copy_that_fails_costs_time_only(
    random_model: Model, name: str, at: int, error: Exception
) -> None:
    """Parking, twins and prompts that begin alike, in one slot and in two."""
    for slots in (1, 2):
        engine = open_engine(random_model, slots)
        (prompt, other) = texts(2, 40)
        wanted = [result.token_ids for result in engine.generate([prompt, other], FREE)]
        faulty = engine.watched
        assert isinstance(faulty, Faulty)
        faulty.name, faulty.at, faulty.error = name, at, error
        engine.submit(Request("a", prompt, FREE, priority=1))
        engine.submit(Request("twin", prompt, FREE, priority=1))
        found: dict[str, list[Event]] = {}
        for n in range(60):
            if n == 5:
                engine.submit(Request("urgent", other, FREE))
                engine.submit(Request("urgent twin", other, FREE, cache_salt="own"))
            for event in engine.step():
                found.setdefault(event.request_id, []).append(event)
        assert {n: output(events) for n, events in found.items()} == {
            "a": wanted[0],
            "twin": wanted[0],
            "urgent": wanted[1],
            "urgent twin": wanted[1],
        }
        expect_nothing_held(engine)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_cache_that_is_not_finite_is_not_kept_for_others(
    random_model: Model, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    engine, (prompt,) = open_engine(random_model), texts(1, 3 * CHUNK)
    wanted = open_engine(random_model).generate([prompt], FREE)
    cache = engine._prefixes
    assert cache is not None
    read = cache._backend.read_cache

    def broken(slot: int, start: int, stop: int) -> NDArray[Any]:
        block = read(slot, start, stop)
        if start:
            block[..., -1, -1] = value
        return block

    with monkeypatch.context() as patched:
        patched.setattr(cache._backend, "read_cache", broken)
        engine.generate([prompt], FREE)
    assert len(cache._blocks) == 1, "the first chunk is finite"
    assert engine.generate([prompt], FREE) == wanted


def test_a_failure_while_binding_leaves_the_next_steps_alone(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, (prompt, other) = open_engine(random_model), texts(2)
    wanted = [result.token_ids for result in engine.generate([prompt, other], FREE)]
    engine.submit(Request("a", prompt, FREE))
    engine.submit(Request("b", other, FREE))
    for _ in range(3):
        engine.step()

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(Binding, "fetch", fail)
    ends = engine.step()
    monkeypatch.undo()
    assert {end.error for end in ends} == {"ONNX Runtime failed: no such device"}
    expect_nothing_held(engine)
    assert [result.token_ids for result in engine.generate([prompt, other], FREE)] == wanted


@pytest.mark.parametrize("where", ["plan", "scan"])
def test_memory_that_ends_beside_the_runtime_ends_only_the_step(
    random_model: Model, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompts = open_engine(random_model), texts(3)
    wanted = [result.token_ids for result in engine.generate(prompts, FREE)]
    for n, prompt in enumerate(prompts):
        engine.submit(Request(str(n), prompt, FREE))
    first = [event for _ in range(3) for event in engine.step()]
    engine.cancel("2")
    engine.submit(Request("waits", prompts[0], FREE))
    engine.submit(Request("waits too", prompts[1], FREE))

    def fails(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        if where == "plan":
            patch.setattr(Scheduler, "admit", fails)
        else:
            patch.setattr(engine, "_passes", engine._passes._replace(scan=fails))
        events = engine.step()
    ends = {event.request_id: event.finish_reason for event in events}
    # The first that waits has the third slot by the time that there are logits.
    failed = ["0", "1"] if where == "plan" else ["0", "1", "waits"]
    assert ends == dict.fromkeys(failed, FinishReason.ERROR) | {"2": FinishReason.CANCELLED}
    assert {event.error for event in events} == {"", "no memory for the step"}
    for n in range(2):
        got = output([event for event in first if event.request_id == str(n)])
        assert got == wanted[n][: len(got)]
    rest = finish(engine)
    assert {name: output(events) for name, events in rest.items()} == {
        name: whole
        for name, whole in zip(("waits", "waits too"), wanted, strict=False)
        if name not in failed
    }
    expect_nothing_held(engine)
    assert [result.token_ids for result in engine.generate(prompts, FREE)] == wanted
