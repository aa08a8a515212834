"""A server's engine whose steps a test lets go one by one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from serving.service import Service
from tests.serving.running import wait_until


class Steps:
    """The steps of a server's engine: each waits until it is let go, or until the engine is asked for
    something, which it does between steps. All go at the end of the block."""

    def __init__(self, service: Service) -> None:
        thread: Any = service.worker._thread
        self._inbox, self._backend = thread._inbox, thread._engine._backend
        self._forward, self._permits = self._backend.forward, threading.Semaphore(0)
        self.rows: list[int] = []
        """How many requests each step that has begun computes."""

    def __enter__(self) -> Steps:
        self._backend.forward = self._hold
        return self

    def __exit__(self, *_: object) -> None:
        self._permits.release(1000)

    def go(self) -> None:
        """Let a step go, and wait for the next one."""
        count = len(self.rows)
        self._permits.release()
        wait_until(lambda: len(self.rows) > count)

    def _hold(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        self.rows.append(len(rows))
        while self._inbox.empty() and not self._permits.acquire(timeout=0.005):
            pass
        return self._forward(rows)
