"""Rotary position embeddings: frequencies, their scalings, and the tables that a graph holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_ROWS = 4096
"""Positions that are computed at once."""


class Scaling(Protocol):
    """A change of the frequencies, so that a model reads texts longer than it was trained on."""

    def __call__(self, frequencies: Floats, theta: float) -> Floats:
        """The scaled frequencies, in radians per token, [size / 2]."""
        ...


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every wavelength is stretched by one factor."""

    factor: float

    def __call__(self, frequencies: Floats, theta: float) -> Floats:
        return frequencies / np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class FactorScaling:
    """Every wavelength is stretched by a factor of its own (LongRoPE)."""

    factors: tuple[float, ...]

    def __call__(self, frequencies: Floats, theta: float) -> Floats:
        return frequencies / np.array(self.factors, np.float32)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Of Llama 3.1: long wavelengths are stretched, short ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequencies: Floats, theta: float) -> Floats:
        wavelengths = 2 * np.pi / frequencies
        turns = self.original_max_position_embeddings / wavelengths
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (kept * frequencies + (1 - kept) * frequencies / self.factor).astype(np.float32)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): wavelengths that turn fewer than `beta_slow` times within the
    original context are stretched, those that turn more than `beta_fast` times are kept."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the bounds between stretched and kept are whole dimensions."""

    def __call__(self, frequencies: Floats, theta: float) -> Floats:
        size = 2 * len(frequencies)
        low = self._dimension(self.beta_fast, size, theta)
        high = self._dimension(self.beta_slow, size, theta)
        if self.truncate:
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        # The same tiny distance as in the reference, where both bounds are one.
        ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low or 0.001)
        stretched = np.clip(ramp, 0, 1).astype(np.float32)
        kept = np.float32(1) - stretched
        return (frequencies / np.float32(self.factor) * stretched + frequencies * kept).astype(
            np.float32
        )

    def _dimension(self, turns: float, size: int, theta: float) -> float:
        """Where the wavelength turns so often within the original context."""
        wavelength = self.original_max_position_embeddings / (turns * 2 * pi)
        return size * log(wavelength) / (2 * log(theta))


@dataclass(frozen=True, slots=True)
class LongContext:
    """Another scaling for texts that are longer than the model was first trained on."""

    scaling: FactorScaling
    beyond: int
    """Tokens; a text with more of them is rotated by this scaling from its first token on."""


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of queries and keys by their position."""

    theta: float = 10_000.0
    scaling: Scaling | None = None
    size: int | None = None
    """How much of a head is rotated, from its beginning; None is all."""
    interleaved: bool = False
    """Whether neighbours are rotated together; otherwise the halves of the rotated part."""
    magnitude: float = 1.0
    """Factor on cosines and sines, by which scalings keep attention as sharp as it was."""
    long: LongContext | None = None

    def frequencies(self, head_size: int, scaling: Scaling | None = None) -> Floats:
        """Radians per token, [rotated / 2]; by `scaling`, or by the rope's own."""
        size = self.size or head_size
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        frequencies = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        scaling = scaling or self.scaling
        return frequencies if scaling is None else scaling(frequencies, self.theta)

    def table(
        self, of: Callable[[Floats], Floats], positions: int, head_size: int
    ) -> tuple[tuple[int, int], Iterator[Floats]]:
        """The shape [rows, rotated / 2] of a table of `of`, `numpy.cos` or `numpy.sin`, and its
        rows in order. With `long` the rows of the long context follow those of the short one."""
        parts = [self.frequencies(head_size)]
        if self.long is not None:
            parts.append(self.frequencies(head_size, self.long.scaling))
        shape = (positions * len(parts), len(parts[0]))
        return shape, self._rows(of, positions, parts)

    def _rows(
        self, of: Callable[[Floats], Floats], positions: int, parts: list[Floats]
    ) -> Iterator[Floats]:
        for frequencies in parts:
            for start in range(0, positions, _ROWS):
                numbers = np.arange(start, min(start + _ROWS, positions), dtype=np.float32)
                values = of(np.outer(numbers, frequencies))
                yield values if self.magnitude == 1 else values * np.float32(self.magnitude)
