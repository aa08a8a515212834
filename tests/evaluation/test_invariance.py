"""How far apart what a model says alone and beside others is."""

from __future__ import annotations

from lifecycle.engines.requests import FinishReason, Generation
from lifecycle.evaluation.invariance import _apart


def said(tokens: list[int], logprobs: list[float]) -> Generation:
    return Generation(tuple(tokens), FinishReason.LENGTH, tuple(logprobs))


def test_the_first_token_that_differs_counts_and_none_behind_it() -> None:
    alone = said([5, 6, 7], [-1.0, -2.0, -3.0])
    assert _apart(alone, said([5, 6, 7], [-1.0, -2.0, -3.0])) == 0
    assert _apart(alone, said([5, 6, 7], [-1.0, -2.25, -3.0])) == 0.25
    assert _apart(alone, said([5, 9, 9], [-1.0, -2.5, -9.0])) == 0.5
    assert _apart(alone, said([9, 6, 7], [-1.125, -9.0, -9.0])) == 0.125
