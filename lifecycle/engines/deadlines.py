"""When requests have to have ended."""

from __future__ import annotations

import heapq
from math import inf

from lifecycle.engines.scheduler import Scheduler
from lifecycle.engines.state import RequestState


class Deadlines:
    """Of the requests of a scheduler, the nearest first. Times are those of `time.monotonic`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, state: RequestState) -> None:
        """Take note of the deadline of a request that the scheduler has."""
        heapq.heappush(self._heap, (state.deadline, state.request.id))
        # No more are kept of requests that have ended than of those that have not.
        count = len(self._scheduler.running) + len(self._scheduler.waiting)
        if len(self._heap) > 2 * count + 16:
            live = ((other.deadline, other.request.id) for other in self._scheduler.states())
            self._heap = [pair for pair in live if pair[0] < inf]
            heapq.heapify(self._heap)

    def met(self, now: float) -> list[RequestState]:
        """The requests whose time is over by `now`; each is told once."""
        found: list[RequestState] = []
        while self._heap and self._heap[0][0] <= now:
            deadline, id = heapq.heappop(self._heap)
            state = self._scheduler.find(id)
            # Another request may have the id by now.
            if state is not None and state.deadline == deadline:
                found.append(state)
        return found
