"""The quickstart's data as a whole: what is tested was never seen."""

from __future__ import annotations

from typing import Any

import pytest

from lifecycle.stages.corpus import Corpus
from lifecycle.stages.python_packages import PythonPackages
from tests.conftest import RunStage


def heads(artifact: Any, split: str) -> set[str]:
    return {" ".join(row["messages"][0]["content"].split()) for row in artifact.rows(split)}


def test_neither_pretraining_nor_finetuning_sees_a_tested_function(run_stage: RunStage) -> None:
    task = run_stage(PythonPackages())
    corpus = run_stage(Corpus(source="python-stdlib"))
    test = heads(task, "test")
    assert len(test) == task.metrics["test"] > 300
    assert not test & heads(task, "train")
    seen = " ".join(" ".join(row["text"].split()) for row in corpus.rows("train"))
    held_out = [" ".join(row["text"].split()) for row in corpus.rows("test")]
    assert len(held_out) > 1000
    assert not [text for text in held_out[::7] if len(text) > 80 and text in seen]
    assert not [head for head in sorted(test)[::3] if head in seen]
    assert all(any(text.startswith(head) for text in held_out) for head in test)
    assert corpus.metrics["train_characters"] > 5_000_000


def test_rows_are_counted_and_stable(run_stage: RunStage) -> None:
    settings = {"packages": ("json", "logging"), "instruction": "Which package?\n", "seed": 3}
    task = run_stage(PythonPackages.model_validate(settings))
    metrics = task.metrics
    assert sum(metrics["train_per_package"].values()) == metrics["train"]
    assert set(metrics["test_per_package"]) <= {"json", "logging"}
    largest = max(metrics["test_per_package"].values()) / metrics["test"]
    assert metrics["largest_class"] == pytest.approx(largest, abs=1e-4)
    row = next(iter(task.rows("train")))  # type: ignore[attr-defined]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"].startswith("Which package?\n")
    assert row["messages"][1]["content"] in ("json", "logging")
    assert run_stage(PythonPackages.model_validate(settings)).digest == task.digest
