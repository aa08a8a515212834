"""The event loop's side of the engine: admission, calls, cancellation, drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lifecycle.engines.base import Engine
from lifecycle.engines.requests import Event, FinishReason, Request
from lifecycle.engines.stats import EngineStats
from lifecycle.errors import EngineError, RequestError
from serving import errors
from serving.engine_thread import EngineThread
from serving.errors import ApiError
from serving.monitor import Monitor

log = logging.getLogger("serving")

T = TypeVar("T")


class Call:
    """The engine requests of one caller, which begin together and fail together.

    Iterate over it for their events: each item is all that came since the last one. Whoever
    holds a call must `close` it, which cancels what still runs.
    """

    def __init__(self, worker: EngineWorker, requests: Sequence[Request]) -> None:
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ids = [request.id for request in requests]
        self.unfinished = set(self._ids)
        self._worker = worker
        self._events: list[Event] = []
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    def push(self, event: Event) -> None:
        """Take one event of one of the requests."""
        self._events.append(event)
        if event.finish_reason is not None:
            self.unfinished.discard(event.request_id)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End the call with an error, after the events that it already has."""
        self._error = error
        self.unfinished.clear()
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._news.set()

    def finish(self, request_id: str) -> None:
        """Cancel one request whose text has ended, and whose further tokens nobody needs."""
        self._worker.monitor.end(request_id, FinishReason.STOP)
        self._worker.monitor.settle(request_id, FinishReason.STOP)
        self._worker.cancel([request_id])
        self.unfinished.discard(request_id)

    def settle(self, request_id: str) -> None:
        """The text of a request goes to its very end."""
        self._worker.monitor.settle(request_id)

    def close(self) -> None:
        """Cancel whatever still runs."""
        self._worker.cancel(list(self.unfinished))
        for request_id in self._ids:
            self.settle(request_id)
        self.unfinished.clear()
        self.accepted.cancel()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> list[Event]:
        if not self._events and self._error is None and self.unfinished:
            self._news.clear()
            await self._news.wait()
        if self._events:
            events, self._events = self._events, []
            return events
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration


class EngineWorker:
    """An engine that runs in its own thread, for use from one event loop."""

    def __init__(self, engine: Engine, max_queue: int, name: str = "") -> None:
        """`name` is the model's, for the monitor."""
        self.monitor = Monitor(name, engine.stats)
        self.capacity = engine.max_num_seqs + max_queue
        """Most requests that may run and wait together."""
        self._thread = EngineThread(engine, self)
        self._calls: dict[str, Call] = {}
        self._jobs: set[asyncio.Future[Any]] = set()
        self._draining = False
        self._dead = False

    def start(self) -> None:
        """Start the engine's thread; its events go to the running event loop."""
        self._thread.start(asyncio.get_running_loop().call_soon_threadsafe)

    @property
    def stats(self) -> EngineStats:
        """The engine's figures after its last step."""
        return self._thread.stats

    @property
    def alive(self) -> bool:
        """Whether the engine can still answer."""
        return not self._dead

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return not (self._dead or self._draining)

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._calls)

    def admit(self, count: int) -> None:
        """Check that `count` more requests may come now; cheap, to be done before other work.

        Raises:
            ApiError: the engine died, the server drains, or the queue is full.
        """
        if self._dead:
            raise errors.engine_stopped()
        if self._draining:
            raise errors.draining()
        if count > self.capacity:
            raise errors.bad_request(
                f"the request asks for {count} answers; this server takes {self.capacity} at most"
            )
        if len(self._calls) + count > self.capacity:
            raise errors.queue_full()

    async def submit(self, requests: Sequence[Request]) -> Call:
        """Queue requests, all or none.

        Raises:
            ApiError: as `admit`, or the engine refuses one of them.
        """
        self.admit(len(requests))
        call = Call(self, requests)
        self._calls.update((request.id, call) for request in requests)
        for request in requests:
            self.monitor.begin(request)
        self._thread.submit(requests)
        try:
            await call.accepted
        except BaseException:
            call.close()
            raise
        return call

    async def run(self, work: Callable[[Engine], T]) -> T:
        """Do something with the engine in its thread, before its next step.

        Raises:
            EngineError: as `work`.
            ApiError: the engine died, or the server drains.
        """
        self.admit(0)
        job: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.add(job)

        def done(result: T, error: EngineError | None) -> None:
            if job.done():
                return
            if error is not None:
                job.set_exception(error)
            else:
                job.set_result(result)

        self._thread.run(work, done)
        try:
            return await job
        finally:
            self._jobs.discard(job)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End requests; events of theirs that are still on the way are dropped."""
        known = [id for id in request_ids if self._calls.pop(id, None)]
        for id in known:
            self.monitor.end(id, "abort")
        if known:
            self._thread.cancel(known)

    def drain(self, timeout: float) -> None:
        """Take no new request; what still runs after `timeout` seconds ends with an error."""
        self._draining = True
        asyncio.get_running_loop().call_later(timeout, self._fail_all, errors.draining())

    async def close(self) -> None:
        """Stop the thread and free the engine; running requests end with an error."""
        self._draining = True
        self._fail_all(errors.draining())
        await asyncio.to_thread(self._thread.stop)

    def on_submitted(self, batch: Sequence[Request], refused: RequestError | None) -> None:
        """The engine took a call's requests, or refused one of them."""
        call = self._calls.get(batch[0].id)
        if call is None:
            return
        if refused is not None:
            for request in batch:
                self.monitor.forget(request.id)
            self._fail(call, errors.bad_request(str(refused)))
        elif not call.accepted.done():
            call.accepted.set_result(None)

    def on_events(self, events: list[Event]) -> None:
        """Hand the events of one step to their calls."""
        for event in events:
            call = self._calls.get(event.request_id)
            if call is None:
                continue
            self.monitor.take(event)
            if event.is_refused:
                self._fail(call, errors.bad_request(event.error))
                continue
            if event.finish_reason is FinishReason.ERROR:
                log.error("request %s failed: %s", event.request_id, event.error)
                self._fail(call, errors.internal_error(event.request_id))
                continue
            if event.finish_reason is not None:
                del self._calls[event.request_id]
            call.push(event)

    def on_death(self) -> None:
        """The engine's thread has died: so does every call, now and later."""
        self._dead = True
        self._fail_all(errors.engine_stopped())

    def _fail(self, call: Call, error: ApiError) -> None:
        self.cancel(list(call.unfinished))
        call.fail(error)

    def _fail_all(self, error: ApiError) -> None:
        for call in set(self._calls.values()):
            self._fail(call, error)
        for job in self._jobs:
            if not job.done():
                job.set_exception(error)
