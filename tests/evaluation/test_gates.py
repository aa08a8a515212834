"""Bounds and verdicts: what passes, what never does, and what is refused before a run."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.errors import GateError
from lifecycle.evaluation.gates import METRICS, Bound, Measure, check_gates, judge, require_passed

ALL = get_args(Measure)
operators = st.sampled_from(["<=", "<", ">=", ">"])
finite = st.floats(-1e50, 1e50)


@pytest.mark.parametrize(
    ("text", "operator", "limit"),
    [
        ("<= 1.02", "<=", 1.02),
        (">=55%", ">=", 0.55),
        (" > 55 % ", ">", 0.55),
        ("<= 0.1 %", "<=", 0.001),
        ("< 1e-4", "<", 1e-4),
        (">= -.5", ">=", -0.5),
    ],
)
def test_a_bound_is_read(text: str, operator: str, limit: float) -> None:
    assert Bound.parse(text) == Bound(operator, limit)


@pytest.mark.parametrize(
    "text", ["", "1.02", "<= ", "== 1", "=< 1", "<= nan", "<= inf", "<= 1 2", "<= 1,02", "<= 1e999"]
)
def test_what_is_no_bound_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"write one like '<= 1\.02'"):
        Bound.parse(text)


@given(operators, finite)
def test_every_finite_limit_can_be_written(operator: str, limit: float) -> None:
    assert Bound.parse(f"{operator} {limit!r}") == Bound(operator, limit)


@given(operators, finite, finite)
def test_a_bound_holds_as_numbers_compare(operator: str, limit: float, measured: float) -> None:
    expected = {
        "<=": measured <= limit,
        "<": measured < limit,
        ">=": measured >= limit,
        ">": measured > limit,
    }
    assert Bound(operator, limit).holds(measured) is expected[operator]


@given(operators, finite, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_no_number_never_passes(operator: str, limit: float, measured: float) -> None:
    assert not Bound(operator, limit).holds(measured)


@given(st.integers(1, 2000), st.integers(0, 1000))
def test_a_share_meets_the_bound_that_names_it(total: int, tenths: int) -> None:
    """A drop of exactly n tenths of a percent passes `<= n/10 %`, whatever floats make of it."""
    share = Fraction(tenths, 1000)
    if (share * total).denominator == 1:
        measured = int(share * total) / total
        assert Bound.parse(f"<= {tenths / 10} %").holds(measured)


def test_a_metric_is_not_known_by_a_near_name() -> None:
    with pytest.raises(ValueError, match="'perplexity_ration'; did you mean 'perplexity_ratio'"):
        check_gates({"perplexity_ration": "<= 1"}, ALL, has_reference=True)


@pytest.mark.parametrize("name", [n for n, metric in METRICS.items() if metric.needs_reference])
def test_a_comparison_needs_a_reference(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' compares two models: set 'reference'"):
        check_gates({name: "<= 1"}, ALL, has_reference=False)
    check_gates({name: "<= 1"}, ALL, has_reference=True)


def test_a_gate_needs_its_measure() -> None:
    with pytest.raises(ValueError, match="add 'accuracy' to 'metrics'"):
        check_gates({"accuracy": ">= 1"}, ["perplexity"], has_reference=False)


def test_a_broken_bound_is_named_with_its_metric() -> None:
    with pytest.raises(ValueError, match="'accuracy': 'high' is no bound"):
        check_gates({"accuracy": "high"}, ALL, has_reference=False)


def test_verdicts_keep_the_order_and_the_spelling_of_the_recipe() -> None:
    gates = {"perplexity": "<= 9", "accuracy": ">= 55 %"}
    verdicts = judge({"accuracy": 0.55, "perplexity": 8.5, "kl": 3.0}, gates)
    assert [(v.metric, v.bound, v.passed) for v in verdicts] == [
        ("perplexity", "<= 9", True),
        ("accuracy", ">= 55 %", True),
    ]
    require_passed(verdicts, {})


def test_every_failed_gate_is_named_beside_its_bound() -> None:
    metrics = {"accuracy": 0.5, "perplexity": math.nan, "kl": 0.0}
    gates = {"accuracy": ">= 55 %", "perplexity": "<= 9", "kl": "<= 1"}
    with pytest.raises(GateError) as raised:
        require_passed(judge(metrics, gates), metrics)
    assert raised.value.metrics == metrics
    assert str(raised.value) == (
        "gates failed (2 of 3): accuracy is 0.5, bound >= 55 %; perplexity is nan, bound <= 9"
    )
