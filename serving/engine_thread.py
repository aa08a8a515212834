"""The thread that owns the engine: commands in through a queue, events out through callbacks."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lifecycle.engines.base import Engine
from lifecycle.engines.requests import Event, FinishReason, Request
from lifecycle.engines.stats import EngineStats
from lifecycle.errors import EngineError, RequestError

log = logging.getLogger("serving")


class Listener(Protocol):
    """What the thread tells; it never calls these itself but hands them to `post`."""

    def on_submitted(self, batch: Sequence[Request], refused: RequestError | None) -> None:
        """The engine took a batch of requests, or refused one of it; those before the refused
        one are in the engine."""

    def on_events(self, events: list[Event]) -> None:
        """What one step gave."""

    def on_death(self) -> None:
        """The thread has ended by an error; nothing will be told any more."""


@dataclass(frozen=True, slots=True)
class _Submit:
    batch: Sequence[Request]


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Run:
    work: Callable[[Engine], Any]
    done: Callable[[Any, EngineError | None], None]


class _Stop:
    pass


_Command = _Submit | _Cancel | _Run | _Stop


class EngineThread:
    """Runs an engine: steps while it has work, waits for a command when it has none.

    An `EngineError` in a step ends the requests of that step, and the engine goes on. Any other
    error is a bug or a lost device: it ends the thread.
    """

    def __init__(self, engine: Engine, listener: Listener) -> None:
        self._engine = engine
        self._listener = listener
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._running: set[str] = set()
        self.stats: EngineStats = engine.stats
        """Figures of the engine after the last step, to be read in any thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._post: Callable[..., Any]

    def start(self, post: Callable[..., Any]) -> None:
        """Begin. `post(callback, *arguments)` has a callback run where the listener lives,
        such as `loop.call_soon_threadsafe`; order is kept."""
        self._post = post
        self._thread.start()

    def submit(self, batch: Sequence[Request]) -> None:
        """Queue requests, all or none, before the next step."""
        self._inbox.put(_Submit(batch))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End requests before the next step."""
        self._inbox.put(_Cancel(request_ids))

    def run(
        self, work: Callable[[Engine], Any], done: Callable[[Any, EngineError | None], None]
    ) -> None:
        """Do something with the engine before the next step; `done` is posted with what it gave, or with
        its error."""
        self._inbox.put(_Run(work, done))

    def stop(self) -> None:
        """End the thread after the step that it is in, and close the engine; blocks."""
        self._inbox.put(_Stop())
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                if not self._idle:
                    self._post(self._listener.on_events, self._step())
                self.stats = self._engine.stats
        except BaseException:
            log.critical("the engine has stopped; the server must be restarted")
            self._post(self._listener.on_death)
            raise
        finally:
            self._engine.close()

    @property
    def _idle(self) -> bool:
        return not (self._engine.num_running or self._engine.num_waiting)

    def _obey(self) -> bool:
        """Do what was asked since the last step; False when that is to stop."""
        for command in self._commands():
            match command:
                case _Submit(batch):
                    self._submit(batch)
                case _Cancel(request_ids):
                    self._cancel(request_ids)
                case _Run(work, done):
                    self._do(work, done)
                case _Stop():
                    return False
        return True

    def _commands(self) -> Iterator[_Command]:
        """What is in the inbox; an idle engine waits until something is."""
        wait = self._idle
        while True:
            try:
                yield self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False

    def _submit(self, batch: Sequence[Request]) -> None:
        refused = None
        for request in batch:
            try:
                self._engine.submit(request)
            except RequestError as error:
                refused = error
                break
            self._running.add(request.id)
        self._post(self._listener.on_submitted, batch, refused)

    def _cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.cancel(request_id)
        self._running.difference_update(request_ids)

    def _do(
        self, work: Callable[[Engine], Any], done: Callable[[Any, EngineError | None], None]
    ) -> None:
        try:
            result = work(self._engine)
        except EngineError as error:
            self._post(done, None, error)
        else:
            self._post(done, result, None)

    def _step(self) -> list[Event]:
        try:
            events = self._engine.step()
        except EngineError as error:
            failed = sorted(self._running)
            if not failed:
                # Nothing is left to end, so the next step would fail in the same way.
                raise
            self._cancel(failed)
            return [Event(id, finish_reason=FinishReason.ERROR, error=str(error)) for id in failed]
        self._running.difference_update(e.request_id for e in events if e.finish_reason)
        return events
