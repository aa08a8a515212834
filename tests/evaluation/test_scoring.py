"""Perplexity and agreement against PyTorch's own functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lifecycle.evaluation import scoring
from lifecycle.evaluation.scoring import Scorer, log_softmax


def logits(seed: int, rows: int = 37, vocab_size: int = 101) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 4, (rows, vocab_size)).astype(np.float32)


def targets(rows: int = 37, vocab_size: int = 101) -> NDArray[np.int64]:
    return np.random.default_rng(9).integers(0, vocab_size, rows)


def test_perplexity_is_that_of_cross_entropy() -> None:
    scorer = Scorer(1)
    scorer.add(targets(), [logits(0)])
    scorer.add(targets(), [logits(1)])
    expected = functional.cross_entropy(
        torch.tensor(np.concatenate([logits(0), logits(1)])).double(),
        torch.tensor(np.concatenate([targets(), targets()])),
    )
    assert scorer.losses[0].mean == pytest.approx(float(expected), rel=1e-12)
    assert scorer.losses[0].perplexity == pytest.approx(math.exp(float(expected)), rel=1e-12)
    assert scorer.losses[0].tokens == 74


def test_agreement_is_that_of_the_definitions() -> None:
    scorer = Scorer(2)
    scorer.add(targets(), [logits(0), logits(1)])
    model, reference = torch.tensor(logits(0)).double(), torch.tensor(logits(1)).double()
    kl = functional.kl_div(
        model.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    same = (model.argmax(-1) == reference.argmax(-1)).double().mean()
    assert scorer.agreement.kl == pytest.approx(float(kl), rel=1e-12)
    assert scorer.agreement.top1 == pytest.approx(float(same))
    assert scorer.agreement.logit_max_diff == pytest.approx(float((model - reference).abs().max()))


def test_a_model_agrees_with_itself() -> None:
    scorer = Scorer(2)
    scorer.add(targets(), [logits(0), logits(0)])
    agreement = scorer.agreement
    assert (agreement.top1, agreement.kl, agreement.logit_max_diff) == (1.0, 0.0, 0.0)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Scorer(2), Scorer(2)
    whole.add(targets(), [logits(0), logits(1)])
    monkeypatch.setattr(scoring, "_BLOCK_VALUES", 300)
    parts.add(targets(), [logits(0), logits(1)])
    assert parts.losses[0].perplexity == pytest.approx(whole.losses[0].perplexity)
    assert parts.agreement.kl == pytest.approx(whole.agreement.kl)
    assert parts.agreement.logit_max_diff == whole.agreement.logit_max_diff


def test_extreme_logits_stay_finite() -> None:
    far = np.array([[3e38, -3e38, 0.0]], np.float32)
    assert np.isfinite(log_softmax(far)).all()


def test_broken_logits_are_seen_in_every_metric() -> None:
    broken = logits(0)
    broken[3, 5] = np.nan
    scorer = Scorer(2)
    scorer.add(targets(), [broken, logits(1)])
    scorer.add(targets(), [logits(0), logits(1)])
    assert math.isnan(scorer.losses[0].perplexity)
    assert math.isnan(scorer.agreement.kl)
    assert math.isnan(scorer.agreement.logit_max_diff)
