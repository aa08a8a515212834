"""The quickstart's task: from the head of a function, tell the package it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from lifecycle.errors import StageError
from lifecycle.kinds import Conversations
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Stage


class PythonPackages(Stage):
    """Functions of the standard library as questions whose answer is their package.

    A function is held out by the same rule as in `corpus` with `source: python-stdlib`, so a
    model that was pre-trained there has seen none of the test split, as long as `holdout` is
    not larger than the corpus'.
    """

    produces = Conversations
    version = 1

    packages: tuple[str, ...] = Field(
        (
            "asyncio",
            "email",
            "importlib",
            "logging",
            "multiprocessing",
            "unittest",
            "urllib",
            "xml",
        ),
        min_length=2,
    )
    """Top-level packages or modules of the standard library."""
    instruction: str = ""
    """Written before the head of each function."""
    max_chars: int = Field(300, ge=20)
    """Characters of the function that are shown, decorators and signature first."""
    min_chars: int = Field(80, ge=0)
    """Shorter functions are left out; they say too little."""
    max_per_package: int | None = Field(470, ge=1)
    """The most functions of one package, both splits together; None takes all."""
    holdout: float = Field(0.15, gt=0, lt=1)
    """The fraction of functions that is held out."""
    seed: int = 0
    """Chooses which functions of a large package are taken, and the order of all."""

    def fingerprint(self) -> Mapping[str, Any]:
        from lifecycle.data.python_source import library_fingerprint

        return library_fingerprint()

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.data.conversations import write_conversations
        from lifecycle.data.package_task import ask_packages, library_functions

        questions = ask_packages(
            library_functions(self.packages),
            max_chars=self.max_chars,
            min_chars=self.min_chars,
            max_per_package=self.max_per_package,
            holdout=self.holdout,
            seed=self.seed,
        )
        rows: dict[bool, list[list[dict[str, Any]]]] = {False: [], True: []}
        answers: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        for question in questions.kept:
            user = {"role": "user", "content": self.instruction + question.head}
            assistant = {"role": "assistant", "content": question.package}
            rows[question.held_out].append([user, assistant])
            answers[question.held_out][question.package] += 1
        if not rows[False] or not rows[True]:
            raise StageError(
                "no functions are left for one of the splits; take more packages, or lower "
                "'min_chars'"
            )
        report = {
            "train": len(rows[False]),
            "test": len(rows[True]),
            "dropped": dict(sorted(questions.dropped.items())),
            "train_per_package": dict(sorted(answers[False].items())),
            "test_per_package": dict(sorted(answers[True].items())),
        }
        write_conversations(ctx.out, rows[False], rows[True], report)
        largest = max(answers[True].values()) / len(rows[True])
        return report | {"largest_class": round(largest, 4)}
