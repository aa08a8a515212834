"""From the times of tokens to the figures that serving is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lifecycle.benchmarking.measure import Measurement, RequestRecord

GOODPUT_KEYS = ("ttft", "tpot", "e2el")
"""The latencies of a request that goodput can bound."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How a latency is distributed, in milliseconds; percentiles between two values lie on the line
    between them."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency | None:
        """Of some values; None of none."""
        if not seconds:
            return None
        values = 1000 * np.array(seconds)
        median, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(float(values.mean()), median, p90, p99)


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a workload gave. Throughput counts all tokens that came; latencies are those of the
    requests that ended."""

    requests: int
    """Submitted."""
    completed: int
    duration_s: float
    """From the start to the last token."""
    prompt_tokens: int
    """Of the requests that got their first token."""
    cached_tokens: int
    """Those of them that were found in the prefix cache."""
    output_tokens: int
    request_throughput: float
    """Requests that ended, per second."""
    output_throughput: float
    """New tokens per second."""
    total_throughput: float
    """Tokens of prompts, cached ones included, and new ones, per second."""
    goodput: float | None
    """Requests per second that were within all bounds; None if there are none."""
    ttft_ms: Latency | None
    """Time to first token, from the arrival."""
    tpot_ms: Latency | None
    """Time per output token of a request, without the first one; requests of one token have none."""
    itl_ms: Latency | None
    """Inter-token latency: all gaps between two tokens of a request."""
    e2el_ms: Latency | None
    """End-to-end latency, from the arrival to the last token."""
    queue_ms: Latency | None
    """From the arrival to the beginning of the step that gave the request a slot."""


def ttft(record: RequestRecord) -> float:
    """Seconds to the first token."""
    return record.token_times[0] - record.arrival


def tpot(record: RequestRecord) -> float | None:
    """Seconds per token after the first one; None if there is no other."""
    times = record.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def e2el(record: RequestRecord) -> float:
    """Seconds to the last token."""
    return record.token_times[-1] - record.arrival


def finished(measurement: Measurement) -> list[RequestRecord]:
    """The requests that ended with all their tokens."""
    return [record for record in measurement.records if record.is_finished]


def inter_token_latencies(measurement: Measurement) -> list[float]:
    """The gaps, in seconds, between the tokens of each request that ended."""
    return [
        later - earlier
        for record in finished(measurement)
        for earlier, later in zip(record.token_times, record.token_times[1:], strict=False)
    ]


def is_good(record: RequestRecord, bounds: Mapping[str, float]) -> bool:
    """Whether a request that ended is within bounds, in milliseconds by `GOODPUT_KEYS`. One without
    a second token is within any bound on `tpot`."""
    values = {"ttft": ttft(record), "tpot": tpot(record) or 0.0, "e2el": e2el(record)}
    return all(1000 * values[name] <= bound for name, bound in bounds.items())


def summarize(measurement: Measurement, bounds: Mapping[str, float] | None = None) -> Metrics:
    """The figures of a measurement; `bounds` are those of goodput."""
    ended = finished(measurement)
    started = [record for record in measurement.records if record.token_times]
    prompt_tokens = sum(record.prompt_len for record in started)
    output_tokens = sum(len(record.token_times) for record in started)
    good = sum(is_good(record, bounds) for record in ended) if bounds else 0

    def per_second(count: int) -> float:
        return count / measurement.duration if measurement.duration else 0.0

    waits = [r.admitted - r.arrival for r in ended if r.admitted is not None]
    return Metrics(
        requests=len(measurement.records),
        completed=len(ended),
        duration_s=measurement.duration,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.cached_tokens for record in started),
        output_tokens=output_tokens,
        request_throughput=per_second(len(ended)),
        output_throughput=per_second(output_tokens),
        total_throughput=per_second(prompt_tokens + output_tokens),
        goodput=per_second(good) if bounds else None,
        ttft_ms=Latency.of([ttft(record) for record in ended]),
        tpot_ms=Latency.of([value for r in ended if (value := tpot(r)) is not None]),
        itl_ms=Latency.of(inter_token_latencies(measurement)),
        e2el_ms=Latency.of([e2el(record) for record in ended]),
        queue_ms=Latency.of(waits),
    )
