"""What two graphs' outputs are beside each other, where a plain maximum would be blind."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lifecycle.errors import StageError
from lifecycle.evaluation.difference import Difference
from lifecycle.evaluation.gates import judge

ROW = np.array([[1.0, 2.0, 3.0]], np.float32)


def test_an_output_that_is_no_number_passes_no_gate() -> None:
    found = Difference()
    found.add("scores", ROW, ROW)
    found.add("scores", np.full_like(ROW, np.nan), ROW)
    found.add("scores", ROW, ROW)
    assert math.isnan(found.metrics["max_relative_error"])
    assert math.isnan(found.metrics["cosine"])
    gates = {"max_relative_error": "<= 1", "cosine": ">= -1"}
    assert not any(verdict.passed for verdict in judge(found.metrics, gates))


def test_masked_scores_are_equal_where_both_are_masked() -> None:
    masked = np.array([[1.0, -np.inf, 3.0]], np.float32)
    found = Difference()
    found.add("scores", masked, masked)
    assert found.max_relative_error == 0
    assert math.isclose(found.cosine, 1)
    found.add("scores", ROW, masked)
    assert math.isnan(found.metrics["cosine"])


def test_truth_values_are_compared_as_numbers() -> None:
    found = Difference()
    found.add("kept", np.array([True, False]), np.array([True, True]))
    assert found.max_relative_error == 1.0


def test_nothing_to_compare_is_no_success() -> None:
    found = Difference()
    found.add("label", np.array(["cat"]), np.array(["dog"]))
    with pytest.raises(StageError, match="no output of numbers"):
        _ = found.metrics
