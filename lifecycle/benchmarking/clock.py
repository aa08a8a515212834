"""Time, as a measurement sees it; tests bring one of their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forward."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let so many pass."""
        ...


class SystemClock:
    """The time of the system."""

    def now(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        time.sleep(seconds)
