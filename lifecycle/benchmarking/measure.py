"""The loop that drives an engine through a workload and writes down when each token came."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lifecycle.benchmarking.clock import Clock, SystemClock
from lifecycle.benchmarking.workload import PlannedRequest
from lifecycle.engines.base import Engine
from lifecycle.engines.requests import Event, FinishReason, Request, SamplingParams
from lifecycle.errors import EngineError

_LONGEST_SLEEP = 0.1
"""Seconds after which a loop that waits for arrivals looks whether it should stop."""


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request; times in seconds of the clock, from the start of the workload."""

    prompt_len: int
    arrival: float
    """When it came. In an open loop that is its time in the workload, though the engine may have
    been in the middle of a step."""
    admitted: float | None = None
    """When the step began that gave it a slot."""
    token_times: list[float] = field(default_factory=list[float])
    """When the step ended that brought each token."""
    cached_tokens: int = 0
    """Of its prompt, found in the prefix cache."""
    is_finished: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """All that was seen of a workload."""

    records: tuple[RequestRecord, ...]
    """Of the requests that were submitted, in that order."""
    duration: float
    """Seconds from the start to the last token."""
    is_complete: bool
    """False if it was stopped before all requests had ended."""


def measure(
    engine: Engine,
    requests: Sequence[PlannedRequest],
    *,
    concurrency: int | None = None,
    clock: Clock | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_done: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Run `requests` on an idle engine, which is idle again afterwards.

    Args:
        concurrency: requests in flight of a closed loop; None takes each at its arrival.
        should_stop: asked before each step.
        on_done: told how many requests have ended, of how many.

    Raises:
        EngineError: a request failed or can never be served.
    """
    loop = _Loop(engine, requests, concurrency, clock or SystemClock())
    told = 0
    try:
        while not loop.is_over and not should_stop():
            loop.advance()
            if on_done is not None and loop.num_done > told:
                told = loop.num_done
                on_done(told, len(requests))
    finally:
        loop.cancel()
    return loop.result()


class _Loop:
    """A workload on its way through an engine."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[PlannedRequest],
        concurrency: int | None,
        clock: Clock,
    ) -> None:
        self._engine, self._clock, self._concurrency = engine, clock, concurrency
        self._total = len(requests)
        self._planned = deque(requests)
        self._records: list[RequestRecord] = []
        self._waiting = deque[RequestRecord]()
        """Submitted and without a slot, the oldest first, as engines serve them."""
        self._running = dict[str, RequestRecord]()
        """Submitted and not ended, by the request's id."""
        self._start = clock.now()
        self._last_token = 0.0
        self.num_done = 0

    @property
    def is_over(self) -> bool:
        return self.num_done == self._total

    def advance(self) -> None:
        """Submit what is due, then make one step, or wait if there is nothing to compute."""
        now = self._now()
        self._submit(now)
        if not self._running:
            arrival = self._planned[0].arrival or 0.0
            self._clock.sleep(min(arrival - now, _LONGEST_SLEEP))
            return
        before = self._now()
        events = self._engine.step()
        self._admit(before)
        after = self._now()
        for event in events:
            self._note(event, after)

    def cancel(self) -> None:
        """Leave an idle engine behind."""
        for id in self._running:
            self._engine.cancel(id)
        if self._running:
            self._engine.step()

    def result(self) -> Measurement:
        """What has been seen so far."""
        return Measurement(tuple(self._records), self._last_token, self.is_over)

    def _now(self) -> float:
        return self._clock.now() - self._start

    def _submit(self, now: float) -> None:
        while self._planned and self._is_due(self._planned[0], now):
            planned = self._planned.popleft()
            arrival = now if planned.arrival is None else planned.arrival
            record = RequestRecord(len(planned.prompt), arrival)
            id = str(len(self._records))
            params = SamplingParams(max_tokens=planned.output_len, ignore_eos=True)
            self._engine.submit(Request(id, planned.prompt.tolist(), params))
            self._records.append(record)
            self._waiting.append(record)
            self._running[id] = record

    def _is_due(self, planned: PlannedRequest, now: float) -> bool:
        if self._concurrency is not None:
            return len(self._running) < self._concurrency
        return (planned.arrival or 0.0) <= now

    def _admit(self, time: float) -> None:
        """Engines do not say which requests got a slot; but they come in turn, so those that no
        longer wait are the oldest ones."""
        while len(self._waiting) > self._engine.num_waiting:
            self._waiting.popleft().admitted = time

    def _note(self, event: Event, time: float) -> None:
        if event.finish_reason is FinishReason.ERROR:
            raise EngineError(f"request {event.request_id} failed: {event.error}")
        record = self._running[event.request_id]
        if event.token_id is not None:
            record.token_times.append(time)
            record.cached_tokens += event.cached_tokens
            self._last_token = time
        if event.finish_reason is not None:
            record.is_finished = True
            self.num_done += 1
            del self._running[event.request_id]
