"""A clock that only steps move: what engines decide by the time that steps take is the same every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lifecycle.engines import (
    batched,
    draft_model,
    prefix_cache,
    progress,
    scheduler,
    speculation,
)
from lifecycle.engines.backend import Row


class StepClock:
    """Stands in for `time` in engines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (batched, draft_model, prefix_cache, progress, scheduler, speculation):
            monkeypatch.setattr(module, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def times(self, backend: Any, step: float, token: float = 0.0, before: float = 0.0) -> None:
        """From now on a step of `backend` takes `step` seconds, `token` for each token more than one, and `before` for
        each that stands before them in its text."""
        forward = backend.forward

        def timed(rows: Sequence[Row]) -> NDArray[np.float32]:
            self.now += step + token * (sum(len(row.tokens) for row in rows) - 1)
            self.now += before * sum(row.start for row in rows)
            return forward(rows)

        backend.forward = timed

    def copies(self, backend: Any, part: float) -> None:
        """From now on to copy a part of a cache takes `part` seconds."""
        for name in ("copy_cache", "read_cache", "write_cache"):
            setattr(backend, name, self._slow(getattr(backend, name), part))

    def _slow(self, copy: Callable[..., Any], part: float) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self.now += part
            return copy(*arguments)

        return timed
