"""Two graphs that should compute the same: how far their outputs, sizes and times are apart."""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.decoder import GRAPH
from lifecycle.engines.ort_session import open_session
from lifecycle.errors import StageError
from lifecycle.graph.activations import Sample, run
from lifecycle.pipeline.stage import Progress

SPEED = "speed"


@dataclass(slots=True)
class Difference:
    """What the outputs of a graph are beside those of its reference, sample after sample."""

    max_relative_error: float = 0.0
    """The largest difference, as a part of the largest value of that output of that sample."""
    cosine: float = 1.0
    """The lowest cosine of two outputs of a sample."""
    equal: int = 0
    rows: int = 0
    """Rows of the first output along its last axis, and those whose largest entry is the same."""
    _is_empty: bool = True

    def add(self, name: str, got: NDArray[Any], wanted: NDArray[Any]) -> None:
        """Compare an output of one sample. What is not finite counts only where both have the same;
        elsewhere all measures become NaN, which no bound holds.

        Raises:
            StageError: the two are of different shapes, or the graph gives no arrays.
        """
        if not (isinstance(got, np.ndarray) and isinstance(wanted, np.ndarray)):
            raise StageError(f"the output '{name}' is no array: only arrays compare")
        if got.shape != wanted.shape:
            raise StageError(
                f"the output '{name}' has shape {list(got.shape)}, that of the reference "
                f"{list(wanted.shape)}: they do not compare"
            )
        if not wanted.size or wanted.dtype.kind not in "fiub":
            return
        self._is_empty = False
        a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        counts = np.isfinite(b) | (a != b)
        a, b = a[counts], b[counts]
        if not np.isfinite([a, b]).all():
            self.max_relative_error = self.cosine = math.nan
            return
        largest = np.abs(b).max(initial=0.0) or 1.0
        error = np.abs(a - b).max(initial=0.0) / largest
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        # An output of zeros has no direction: it is right if the other is zeros as well.
        cosine = a @ b / lengths if lengths else float(np.array_equal(a, b))
        # Python's own max and min would forget a NaN.
        self.max_relative_error = float(np.maximum(self.max_relative_error, error))
        self.cosine = float(np.minimum(self.cosine, cosine))

    def count(self, got: NDArray[Any], wanted: NDArray[Any]) -> None:
        """Compare what two classifiers prefer."""
        if wanted.ndim and wanted.shape[-1] > 1:
            same = got.argmax(axis=-1) == wanted.argmax(axis=-1)
            self.equal += int(same.sum())
            self.rows += same.size

    @property
    def metrics(self) -> dict[str, float]:
        """By name, with six significant digits: what lies beyond is the noise of a machine.

        Raises:
            StageError: nothing was compared.
        """
        if self._is_empty:
            raise StageError("the graphs do not compare: they have no output of numbers")
        found = {"max_relative_error": self.max_relative_error, "cosine": self.cosine}
        if self.rows:
            found["top1_agreement"] = self.equal / self.rows
        return {name: float(f"{value:.6g}") for name, value in found.items()}


class Pair:
    """A graph and its reference, open side by side."""

    def __init__(self, model: Path, reference: Path, outputs: Sequence[str] | None = None) -> None:
        """`outputs` are those to compare; None takes all.

        Raises:
            StageError: the two have different inputs or outputs.
        """
        self._sessions = [
            open_session(folder / GRAPH, ("CPUExecutionProvider",)) for folder in (model, reference)
        ]
        ports = [_ports(session) for session in self._sessions]
        if ports[0] != ports[1]:
            raise StageError(
                f"the graphs do not compare: one has {_told(ports[0])}, its reference "
                f"{_told(ports[1])}"
            )
        self._names = list(outputs or ports[0][1])

    def difference(self, samples: Sequence[Sample], progress: Progress) -> Difference:
        """Compare the outputs for all samples, one at a time."""
        found = Difference()
        for number, sample in enumerate(samples, start=1):
            got, wanted = self._both(sample, number)
            for name, one, other in zip(self._names, got, wanted, strict=True):
                found.add(name, one, other)
            found.count(got[0], wanted[0])
            progress.update(number, len(samples))
        return found

    def speeds(self, samples: Sequence[Sample], turns: int, progress: Progress) -> dict[str, float]:
        """The model's speed over the reference's: median, lowest and highest of `turns`.
        In a turn both run over all samples, the one right behind the other; the first turn, in
        which memory is allocated, does not count."""
        ratios: list[float] = []
        for turn in range(turns + 1):
            seconds = [0.0, 0.0]
            for number, sample in enumerate(samples, start=1):
                for place, session in enumerate(self._sessions):
                    begin = time.perf_counter()
                    run(session, sample, number, self._names)
                    seconds[place] += time.perf_counter() - begin
            if turn:
                ratios.append(seconds[1] / seconds[0])
            progress.update(turn, turns)
        found = {"": statistics.median(ratios), "_low": min(ratios), "_high": max(ratios)}
        return {f"{SPEED}{name}": round(value, 3) for name, value in found.items()}

    def _both(self, sample: Sample, number: int) -> list[list[NDArray[Any]]]:
        return [run(session, sample, number, self._names) for session in self._sessions]


def _ports(session: ort.InferenceSession) -> tuple[list[str], list[str]]:
    inputs = [value.name for value in session.get_inputs()]
    return inputs, [value.name for value in session.get_outputs()]


def _told(ports: tuple[list[str], list[str]]) -> str:
    return f"the inputs {', '.join(ports[0])} and the outputs {', '.join(ports[1])}"
