"""Schemas as llguidance is given them: as narrow as JSON Schema means them."""

from __future__ import annotations

import re
from datetime import date, timedelta
from typing import Any

import numpy as np
import pytest

from lifecycle.engines.grammar.exact import FORMATS, exact, exact_pattern
from lifecycle.engines.sampling import masked


def is_allowed(name: str, text: str) -> bool:
    return re.search(FORMATS[name]["pattern"], text) is not None


def test_all_days_there_are_and_no_29th_of_february_that_is_none() -> None:
    for year in (1, 4, 100, 400, 1900, 1996, 2000, 2023, 2024, 2100, 2400, 9996):
        days = [date(year, 1, 1) + timedelta(n) for n in range(365)]
        assert all(is_allowed("date", day.isoformat()) for day in days)
        is_leap = (date(year, 3, 1) - date(year, 2, 28)).days == 2
        assert is_allowed("date", f"{year:04}-02-29") == is_leap
        assert is_allowed("date-time", f"{year:04}-02-29T00:00:00Z") == is_leap
        assert not is_allowed("date", f"{year:04}-02-30")


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ("00:00:00Z", True),
        ("23:59:59.5+05:30", True),
        ("23:59:60Z", True),
        ("23:59:60.1-00:00", True),
        ("23:59:60+01:00", False),
        ("22:59:60Z", False),
        ("23:58:60Z", False),
        ("12:00:61Z", False),
    ],
)
def test_leap_seconds_end_days_in_utc(text: str, is_valid: bool) -> None:
    assert is_allowed("time", text) == is_allowed("date-time", f"2020-02-29T{text}") == is_valid


@pytest.mark.parametrize(
    ("name", "is_valid"),
    [
        ("example.com", True),
        ("a-b.c-d-e", True),
        ("x" * 63, True),
        ("x" * 64, False),
        ("a-" * 31 + "a", True),
        ("xn--hello-txk", False),
        ("-a", False),
        ("a-.b", False),
        ("a..b", False),
    ],
)
def test_names_of_hosts(name: str, is_valid: bool) -> None:
    assert is_allowed("hostname", name) == is_valid


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object", "properties": {"format": {"type": "string"}, "pattern": {}}},
        {"const": {"format": "date", "pattern": r"\s"}, "default": {"format": "date"}},
        {"enum": [{"format": "time"}]},
        {"type": "string", "format": "uuid", "pattern": "^[a-f]+$"},
        {"patternProperties": {"^a": {"items": [1]}}, "additionalProperties": False},
    ],
)
def test_what_needs_nothing_stays_as_it_is(schema: Any) -> None:
    assert exact(schema) == schema


def test_parts_of_schemas_are_found_and_stay_in_order() -> None:
    when = {"type": "string", "format": "date", "allOf": [{"pattern": "^2"}]}
    narrow = {**when, "allOf": [{"pattern": "^2"}, FORMATS["date"]]}
    schema = {
        "properties": {"b": when, "a": {"items": {"anyOf": [when, {"type": "null"}]}}},
        "$defs": {"when": when},
        "patternProperties": {r"^\s$": when},
    }
    found: Any = exact(schema)
    white = exact_pattern(r"^\s$")
    assert found == {
        "properties": {"b": narrow, "a": {"items": {"anyOf": [narrow, {"type": "null"}]}}},
        "$defs": {"when": narrow},
        "patternProperties": {white: narrow},
    }
    assert list(found["properties"]) == ["b", "a"]
    assert when["allOf"] == [{"pattern": "^2"}], "the client's schema was changed"


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (r"^\s$", " \t\ufeff\u2028", "a\u0085"),
        (r"^\S$", "a\u0085", " \ufeff"),
        (r"^[\sx]$", " x\ufeff", "y\u0085"),
        (r"^[\]\s]$", "] \ufeff", "a"),
    ],
)
def test_white_space_is_that_of_ecmascript(pattern: str, matching: str, others: str) -> None:
    found = exact_pattern(pattern)
    assert all(re.search(found, text) for text in matching)
    assert not any(re.search(found, text) for text in others)


@pytest.mark.parametrize("pattern", [r"^\\s$", r"^[\s-x]$", "[a-z]"])
def test_what_is_no_white_space_stays(pattern: str) -> None:
    assert exact_pattern(pattern) == pattern


@pytest.mark.parametrize("pattern", [r"[\s-]", r"[-\s]", r"[^-\s]"])
def test_a_hyphen_at_an_end_is_one(pattern: str) -> None:
    found = exact_pattern(pattern)
    assert (
        (re.search(found, "-") is None)
        == pattern.startswith("[^")
        == (re.search(found, "x") is not None)
    )


def test_a_masked_row_is_what_numpy_makes_of_it() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 1.0):
        logits = rng.standard_normal(999).astype(np.float32) * 1e4
        logits[:3] = [0.0, np.finfo(np.float32).min, -np.inf]
        mask = rng.random(999) < share
        with np.errstate(over="ignore"):
            assert np.array_equal(masked(logits, mask), np.where(mask, logits, -np.inf))
