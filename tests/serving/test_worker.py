"""Admission, cancellation, failures and drain, without HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from lifecycle.engines.requests import FinishReason, Request, SamplingParams
from lifecycle.errors import EngineError
from serving.errors import ApiError
from serving.worker import Call, EngineWorker
from tests.serving.scripted import ScriptedBackend, ScriptedEngine

SCRIPT = [5, 6, 7, 8]

Check = Callable[[EngineWorker, ScriptedBackend], Awaitable[None]]


def run(check: Check, max_queue: int = 1) -> None:
    """Run a check on a worker with two slots."""

    async def main() -> None:
        engine = ScriptedEngine.make(SCRIPT, vocab_size=16, slots=2)
        worker = EngineWorker(engine, max_queue)
        worker.start()
        try:
            await asyncio.wait_for(check(worker, engine.backend), 60)
        finally:
            engine.backend.go()
            await worker.close()

    asyncio.run(main())


def request(id: str, max_tokens: int = 4, prompt: list[int] | None = None) -> Request:
    return Request(id, prompt or [1], SamplingParams(max_tokens=max_tokens))


async def tokens(call: Call) -> list[tuple[str, int | None]]:
    return [(e.request_id, e.token_id) async for events in call for e in events]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_a_call_gets_all_events_of_its_requests() -> None:
    async def check(worker: EngineWorker, _: ScriptedBackend) -> None:
        call = await worker.submit([request("a"), request("b", 2)])
        got = await tokens(call)
        assert [t for id, t in got if id == "a"] == [6, 7, 8, 5]
        assert [t for id, t in got if id == "b"] == [6, 7]
        assert worker.num_unfinished == 0

    run(check)


def test_more_than_may_wait_are_refused_at_once() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        backend.hold()
        calls = [asyncio.create_task(worker.submit([request(str(i))])) for i in range(3)]
        await until(lambda: worker.num_unfinished == 3)
        with pytest.raises(ApiError) as caught:
            await worker.submit([request("late")])
        assert (caught.value.status, caught.value.code) == (503, "queue_full")
        backend.go()
        for call in calls:
            assert len(await tokens(await call)) == 4
        assert len(await tokens(await worker.submit([request("later")]))) == 4

    run(check)


def test_what_never_fits_is_the_clients_error() -> None:
    async def check(worker: EngineWorker, _: ScriptedBackend) -> None:
        with pytest.raises(ApiError) as caught:
            worker.admit(4)
        assert caught.value.status == 400

    run(check)


def test_one_refused_request_refuses_the_call() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        with pytest.raises(ApiError, match="token id 99") as caught:
            await worker.submit([request("good"), request("bad", prompt=[99])])
        assert caught.value.status == 400
        assert worker.num_unfinished == 0
        assert len(await tokens(await worker.submit([request("next")]))) == 4

    run(check)


def test_closing_a_call_frees_its_slots() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        backend.hold(after=2)
        call = await worker.submit([request("a", 400), request("b", 400)])
        await until(lambda: backend.is_held)
        assert await anext(call)
        call.close()
        assert worker.num_unfinished == 0
        assert [event async for event in call] == []
        backend.go()
        assert len(await tokens(await worker.submit([request("c")]))) == 4
        # Both slots would be taken for 400 steps otherwise.
        assert backend.num_steps == 3 + 4

    run(check)


def test_a_caller_that_is_cancelled_while_it_submits_leaves_nothing_behind() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        backend.hold()
        first = await worker.submit([request("first")])
        await until(lambda: backend.is_held)
        task = asyncio.create_task(worker.submit([request("second")]))
        await until(lambda: worker.num_unfinished == 2)
        task.cancel()
        await asyncio.wait([task])
        assert worker.num_unfinished == 1
        backend.go()
        assert len(await tokens(first)) == 4

    run(check)


def test_a_failed_step_ends_its_requests_and_the_next_one_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        backend.failure = EngineError("the device at 0x7f00 is gone")
        call = await worker.submit([request("a"), request("b")])
        with pytest.raises(ApiError) as caught:
            await tokens(call)
        assert (caught.value.status, caught.value.code) == (500, "internal_error")
        assert "0x7f00" not in caught.value.message
        assert worker.alive and worker.num_unfinished == 0
        assert len(await tokens(await worker.submit([request("c")]))) == 4

    run(check)
    assert "0x7f00" in caplog.text


def test_an_engine_that_cannot_step_ends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(worker: EngineWorker, _: ScriptedBackend) -> None:
        def step(self: ScriptedEngine) -> None:
            monkeypatch.undo()
            raise EngineError("no step")

        monkeypatch.setattr(ScriptedEngine, "step", step)
        with pytest.raises(ApiError):
            await tokens(await worker.submit([request("a")]))
        assert len(await tokens(await worker.submit([request("b")]))) == 4

    run(check)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_fails_calls_instead_of_hanging() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        backend.failure = RuntimeError("a bug")
        call = await worker.submit([request("a")])
        with pytest.raises(ApiError) as caught:
            await tokens(call)
        assert (caught.value.status, caught.value.code) == (503, "engine_stopped")
        assert not worker.alive and not worker.ready
        with pytest.raises(ApiError):
            await worker.submit([request("b")])

    run(check)


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        backend.hold()
        call = await worker.submit([request("a")])
        worker.drain(timeout=30)
        assert worker.alive and not worker.ready
        with pytest.raises(ApiError) as caught:
            await worker.submit([request("b")])
        assert caught.value.headers["Retry-After"]
        backend.go()
        assert len(await tokens(call)) == 4

    run(check)


def test_drain_ends_what_takes_too_long() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        backend.hold()
        call = await worker.submit([request("a")])
        worker.drain(timeout=0.05)
        with pytest.raises(ApiError) as caught:
            await tokens(call)
        assert caught.value.code == "draining"

    run(check)


def test_events_are_coalesced_for_a_slow_reader() -> None:
    async def check(worker: EngineWorker, _: ScriptedBackend) -> None:
        call = await worker.submit([request("a", 50)])
        await until(lambda: not call.unfinished)
        events = await anext(call)
        assert len(events) == 50
        assert events[-1].finish_reason is FinishReason.LENGTH

    run(check)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_on_the_engine_is_done_between_steps_and_ends_with_it() -> None:
    async def check(worker: EngineWorker, backend: ScriptedBackend) -> None:
        assert await worker.run(lambda engine: engine.max_num_seqs) == 2
        with pytest.raises(EngineError, match="no adapter 'a' is loaded"):
            await worker.run(lambda engine: engine.unload_adapter("a"))
        backend.hold()
        call = await worker.submit([request("a", 100)])
        await until(lambda: backend.is_held)
        waiting = asyncio.create_task(
            worker.run(lambda engine: (engine.num_running, backend.num_steps))
        )
        await asyncio.sleep(0)
        backend.go()
        # Not while the first step was under way.
        assert await waiting == (1, 1)
        call.close()
        gate = threading.Event()

        def die(_: object) -> None:
            gate.wait()
            raise RuntimeError("a bug")

        jobs = [asyncio.create_task(worker.run(work)) for work in (die, lambda _: None)]
        await asyncio.sleep(0)
        gate.set()
        for job in jobs:
            with pytest.raises(ApiError) as caught:
                await job
            assert caught.value.code == "engine_stopped"
        with pytest.raises(ApiError):
            await worker.run(lambda engine: engine.num_running)

    run(check)
