"""The toy engine on a clock that only its steps and sleeps move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lifecycle.benchmarking.workload import PlannedRequest
from lifecycle.engines.backend import Row
from tests.engines.toy import ToyEngine


class FakeClock:
    """A `Clock`; each step of `engine` takes a second."""

    def __init__(self, engine: ToyEngine) -> None:
        self.time = 100.0
        forward = engine.backend.forward

        def slow(rows: Sequence[Row]):
            self.time += 1.0
            return forward(rows)

        engine.backend.forward = slow

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def planned(
    prompt_len: int, output_len: int, arrival: float | None = None, first: int = 1
) -> PlannedRequest:
    """A request whose prompt counts up from `first`."""
    prompt = np.arange(first, first + prompt_len, dtype=np.int32)
    return PlannedRequest(prompt, output_len, arrival)
