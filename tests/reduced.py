"""The quickstart in a reduced form: every stage for real, in seconds, learning little."""

from __future__ import annotations

CHECKS = ("before", "after", "after_merge", "check_onnx", "check_int8", "check_int4")

OVERRIDES = (
    "text.holdout=0.15",
    "tokens.vocab_size=512",
    "base.steps=12",
    "base.context_length=128",
    "base.evaluate_rows=8",
    "task.max_per_package=20",
    "tuned.epochs=1",
    "tuned.context_length=192",
    *(f"{check}.max_samples=8" for check in CHECKS),
    *(f"{check}.max_generated=8" for check in CHECKS),
    # A model that has learnt nothing passes no bound on what it answers.
    'check_onnx.gates={logit_max_diff: "<= 1e-4"}',
    *(f"{check}.gates={{}}" for check in ("after", "after_merge", "check_int4")),
    'check_int8.gates={perplexity_ratio: "<= 1.05"}',
)
