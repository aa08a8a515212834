"""What an engine is asked while it is measured: random prompts of fixed lengths, and when they come.

A closed loop keeps so many requests in flight: the next one comes when one has ended. An open loop
does not wait: requests come at their times, whether the engine keeps up or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

_WARM_UP_TOKENS = 8
"""Most new tokens of a request that warms up."""
_WARM_UP_STREAM = 1
"""Sets the random tokens of warming up apart from those that are measured, which the prefix cache
must not have seen."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request that has not been made yet."""

    prompt: Tokens
    output_len: int
    """Tokens that are generated, no fewer and no more."""
    arrival: float | None = None
    """Seconds after the start; None in a closed loop."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured together, as one point of a report."""

    requests: tuple[PlannedRequest, ...]
    warm_up: tuple[PlannedRequest, ...]
    """Made and forgotten before the measurement, all at once."""
    concurrency: int | None = None
    """Requests in flight of a closed loop; None for an open one."""
    rate: float | None = None
    """Mean arrivals per second, if they are random."""
    prompt_len: int | None = None
    """Tokens of every prompt, if they are all alike."""
    output_len: int | None = None

    @property
    def label(self) -> str:
        """What tells it from the others of a sweep: `batch 4`, `rate 2`, `trace`."""
        if self.concurrency is not None:
            return f"batch {self.concurrency}"
        return "trace" if self.rate is None else f"rate {self.rate:g}"

    @property
    def lengths(self) -> str:
        """`128 + 64 tokens`, where all requests are alike."""
        return "" if self.prompt_len is None else f"{self.prompt_len} + {self.output_len} tokens"

    @property
    def arrivals(self) -> str:
        """`856 requests over 1,022 s`, where they come at their own times."""
        last = max((request.arrival or 0.0 for request in self.requests), default=0.0)
        many = f"{len(self.requests):,} requests"
        return "" if self.concurrency is not None else f"{many} over {last:,.0f} s"


def closed_loop(
    prompt_len: int, output_len: int, concurrency: int, count: int, *, vocab_size: int, seed: int
) -> Workload:
    """`count` requests, `concurrency` of them in flight at any time."""
    key = [seed, prompt_len, output_len, concurrency]
    prompts = _prompts(key, [prompt_len] * count, vocab_size)
    return Workload(
        requests=tuple(PlannedRequest(prompt, output_len) for prompt in prompts),
        warm_up=warm_up(key, [(prompt_len, output_len)] * concurrency, vocab_size),
        concurrency=concurrency,
        prompt_len=prompt_len,
        output_len=output_len,
    )


def open_loop(
    prompt_len: int,
    output_len: int,
    rate: float,
    count: int,
    *,
    num_slots: int,
    vocab_size: int,
    seed: int,
) -> Workload:
    """`count` requests that come at random, `rate` a second on average."""
    key = [seed, prompt_len, output_len]
    prompts = _prompts(key, [prompt_len] * count, vocab_size)
    arrivals = poisson_arrivals(rate, count, seed)
    return Workload(
        requests=tuple(
            PlannedRequest(prompt, output_len, arrival)
            for prompt, arrival in zip(prompts, arrivals, strict=True)
        ),
        warm_up=warm_up(key, [(prompt_len, output_len)] * min(num_slots, count), vocab_size),
        rate=rate,
        prompt_len=prompt_len,
        output_len=output_len,
    )


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which the requests of a Poisson process come, the first one at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    gaps[:1] = 0.0
    return np.cumsum(gaps).tolist()


def warm_up(
    key: Sequence[int], lengths: Sequence[tuple[int, int]], vocab_size: int
) -> tuple[PlannedRequest, ...]:
    """Requests of such lengths of prompt and output, the outputs cut short, with prompts of their
    own."""
    prompts = _prompts([*key, _WARM_UP_STREAM], [prompt for prompt, _ in lengths], vocab_size)
    return tuple(
        PlannedRequest(prompt, min(output, _WARM_UP_TOKENS))
        for prompt, (_, output) in zip(prompts, lengths, strict=True)
    )


def _prompts(key: Sequence[int], lengths: Sequence[int], vocab_size: int) -> list[Tokens]:
    rng = np.random.default_rng(key)
    return [rng.integers(0, vocab_size, length, dtype=np.int32) for length in lengths]
