"""Figures against values computed by hand."""

from __future__ import annotations

import pytest

from lifecycle.benchmarking.measure import Measurement, RequestRecord, measure
from lifecycle.benchmarking.metrics import Latency, summarize
from lifecycle.benchmarking.report import measure_point
from lifecycle.benchmarking.workload import Workload
from tests.benchmarking.timed import FakeClock, planned
from tests.engines.toy import ToyEngine


def test_percentiles_lie_between_the_values() -> None:
    assert Latency.of([4.0, 1.0, 3.0, 2.0]) == Latency(
        2500, 2500, pytest.approx(3700), pytest.approx(3970)
    )
    assert Latency.of([2.0]) == Latency(2000, 2000, 2000, 2000)
    assert Latency.of([]) is None


RECORDS = (
    RequestRecord(10, 0.0, 0.0, [1.0, 1.5, 3.0], 8, True),
    RequestRecord(20, 1.0, 2.0, [4.0], 0, True),
    RequestRecord(30, 2.0, 3.0, [5.0, 6.0], 16),
    RequestRecord(40, 3.0),
)


def test_metrics_by_hand() -> None:
    found = summarize(Measurement(RECORDS, 8.0, False), {"ttft": 2000, "tpot": 1000})
    assert (found.requests, found.completed, found.duration_s) == (4, 2, 8)
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (60, 24, 6)
    assert found.request_throughput == 2 / 8
    assert found.output_throughput == 6 / 8
    assert found.total_throughput == 66 / 8
    assert found.goodput == 1 / 8
    assert found.ttft_ms == Latency(2000, 2000, pytest.approx(2800), pytest.approx(2980))
    assert found.tpot_ms == Latency(1000, 1000, 1000, 1000)
    assert found.itl_ms == Latency(1000, 1000, pytest.approx(1400), pytest.approx(1490))
    assert found.e2el_ms == Latency(3000, 3000, 3000, 3000)
    assert found.queue_ms == Latency(500, 500, pytest.approx(900), pytest.approx(990))


def test_each_bound_of_goodput_counts() -> None:
    measurement = Measurement(RECORDS, 8.0, False)
    for bounds, good in (
        ({"ttft": 1000}, 1),
        ({"tpot": 999}, 1),
        ({"e2el": 3000}, 2),
        ({"e2el": 2999}, 0),
        ({"ttft": 3000, "tpot": 999}, 1),
    ):
        assert summarize(measurement, bounds).goodput == good / 8
    assert summarize(measurement).goodput is None


def test_requests_of_one_token_have_no_time_per_token() -> None:
    engine = ToyEngine.make(max_num_seqs=1, prefill_chunk=4)
    found = summarize(measure(engine, [planned(8, 1)], concurrency=1, clock=FakeClock(engine)))
    assert found.ttft_ms == found.e2el_ms == Latency(2000, 2000, 2000, 2000)
    assert found.tpot_ms is found.itl_ms is None


def test_nothing_measured_is_no_division_by_zero() -> None:
    found = summarize(Measurement((), 0.0, False), {"ttft": 1})
    assert (found.output_throughput, found.goodput, found.ttft_ms) == (0, 0, None)


def test_warming_up_is_not_part_of_a_point() -> None:
    engine = ToyEngine.make(max_num_seqs=2, prefill_chunk=4)
    requests = (planned(4, 2), planned(4, 2))
    point = measure_point(
        engine,
        Workload(requests, (planned(8, 3),), concurrency=1),
        base_rss=0,
        clock=FakeClock(engine),
    )
    assert point is not None
    assert (point.metrics.duration_s, point.metrics.output_tokens) == (4, 4)
    assert point.peak_rss_bytes > 1 << 20
    stopped = measure_point(
        engine, Workload(requests, requests, 1), base_rss=None, should_stop=lambda: True
    )
    assert stopped is None
