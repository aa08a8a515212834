"""A classification task on the standard library: a function's head, and its package."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from lifecycle.data.python_source import (
    Function,
    functions,
    package_of,
    read_source,
    source_files,
)
from lifecycle.data.split import is_held_out, position
from lifecycle.errors import DataError
from lifecycle.pipeline.suggest import did_you_mean


@dataclass(frozen=True, slots=True)
class Question:
    """The head of a function, to be answered with its package."""

    head: str
    package: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions in a shuffled order, and how many functions were left out, by reason."""

    kept: list[Question]
    dropped: Counter[str]


def library_functions(packages: Collection[str]) -> Iterator[Function]:
    """All outermost functions of some packages.

    Raises:
        DataError: this Python has no such package, or it has no functions.
    """
    empty = set(packages)
    for name, path in source_files().items():
        if package_of(name) in packages:
            for function in functions(name, read_source(path)):
                empty.discard(function.package)
                yield function
    if empty:
        package = min(empty)
        raise DataError(
            f"the standard library of this Python has no functions of '{package}'"
            f"{did_you_mean(package, map(package_of, source_files()))}"
        )


def ask_packages(
    found: Iterable[Function],
    *,
    max_chars: int,
    min_chars: int,
    max_per_package: int | None,
    holdout: float,
    seed: int,
) -> Questions:
    """One question per function that can be answered and is in one split only.

    A head that occurs in two packages has two answers, and one that occurs in both splits would
    show the test to training: both are dropped. Of copies within a package one is kept.
    """
    dropped = Counter[str]()
    by_head: defaultdict[str, list[Question]] = defaultdict(list)
    for function in found:
        if len(function.source) < min_chars:
            dropped["too short"] += 1
            continue
        head = function.source[:max_chars].rstrip()
        held_out = is_held_out(function.key, holdout)
        by_head[" ".join(head.split())].append(Question(head, function.package, held_out))
    kept: list[Question] = []
    taken = Counter[str]()
    # Another text than the rule of the split hashes: else held-out functions would come first.
    for key in sorted(by_head, key=lambda key: (position(f"order of {key}", seed), key)):
        same = by_head[key]
        question = same[0]
        if any(other.package != question.package for other in same):
            dropped["in several packages"] += len(same)
        elif any(other.held_out != question.held_out for other in same):
            dropped["in both splits"] += len(same)
        elif taken[question.package] == max_per_package:
            dropped["over the most per package"] += len(same)
        else:
            dropped["copies"] += len(same) - 1
            taken[question.package] += 1
            kept.append(question)
    return Questions(kept, dropped)
