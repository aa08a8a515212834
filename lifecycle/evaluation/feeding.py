"""Ways of feeding texts to an engine, which must all lead to the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.batched import BatchedEngine
from lifecycle.errors import StageError
from lifecycle.evaluation.findings import Findings
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.evaluation.samples import Sample
from lifecycle.evaluation.subject import Subject
from lifecycle.pipeline.stage import Progress

Logits = NDArray[np.float32]

CHUNK = 16
"""Tokens of a text that are fed at a time where it is cut."""
_TEXTS, _MOST = 3, 256
"""Texts that an evaluation feeds in all ways, and most tokens of each: the logits of all are in memory twice."""


def compare_feeding(subject: Subject, samples: Sequence[Sample], progress: Progress) -> Findings:
    """`feeding_max_diff`: how far logits of a few texts that are fed in chunks, ragged among others, after a rollback,
    and with adapters beside others where there are slots for them, are at most from those of each at once or alone.

    Raises:
        EngineError: the engine failed, or it cannot take tokens back, as PyTorch's of a model with sliding windows.
        StageError: it cannot be fed so, or its logits are no numbers.
    """
    engine = subject.engine
    if not isinstance(engine, BatchedEngine):
        raise StageError("'feeding' is measured of models that this project's engines run")
    texts = [list(sample.token_ids[:_MOST]) for sample in samples[:_TEXTS]]
    if len(texts) == 1:
        # Somebody must be beside it.
        texts.append(texts[0][::-1])
    wanted = [engine.logits(text) for text in texts]
    found: list[float] = []
    for feed in WAYS.values():
        found.append(distance(feed(engine, texts), wanted))
        progress.update(len(found), len(WAYS))
    if (layout := AdapterLayout.load(subject.artifact.path)) is not None:
        with random_adapters(engine, layout, len(texts) - 1) as numbers:
            numbers = [*numbers, *[0] * (len(texts) - len(numbers))]
            pairs = zip(texts, numbers, strict=True)
            by_itself = [alone(engine, text, 0, number) for text, number in pairs]
            found.append(distance(ragged(engine, texts, numbers), by_itself))
    return Findings(metrics={"feeding_max_diff": max(found)}, counts={"feeding_texts": len(texts)})


@contextmanager
def random_adapters(
    engine: BatchedEngine, layout: AdapterLayout, most: int
) -> Iterator[Sequence[int]]:
    """Random adapters in as many slots as there are, `most` at most; inside they are loaded, under these numbers."""
    names = [f"random {n}" for n in range(min(layout.slots, most))]
    with TemporaryDirectory() as root:
        for n, name in enumerate(names):
            write_random_adapter(Path(root, str(n)), layout, seed=n)
            engine.load_adapter(name, Path(root, str(n)))
    yield [engine.adapter_number(name) for name in names]
    for name in names:
        engine.unload_adapter(name)


def distance(found: Sequence[Logits], wanted: Sequence[Logits]) -> float:
    """The largest difference, as a part of the largest of `wanted`, or of 1 if that is larger.

    Raises:
        StageError: they are no numbers.
    """
    pairs = list(zip(found, wanted, strict=True))
    if not all(np.isfinite(one).all() and np.isfinite(other).all() for one, other in pairs):
        raise StageError("the model's logits are no finite numbers; its weights are damaged")
    scale = max(1.0, *(float(np.abs(logits).max()) for logits in wanted))
    return max(float(np.abs(one - other).max()) for one, other in pairs) / scale


def in_chunks(engine: BatchedEngine, texts: Sequence[list[int]]) -> list[Logits]:
    """One text after the other."""
    return [alone(engine, text, 0) for text in texts]


def alone(engine: BatchedEngine, text: list[int], start: int, adapter: int = 0) -> Logits:
    """The rest of a text from `start`, chunk by chunk."""
    parts = [
        engine.forward([_row(engine, text, at, at + CHUNK, 0, adapter)]).copy()
        for at in range(start, len(text), CHUNK)
    ]
    return np.concatenate(parts)


def ragged(
    engine: BatchedEngine, texts: Sequence[list[int]], adapters: Sequence[int] = (0, 0, 0)
) -> list[Logits]:
    """All at once, each at its own speed, from the last slot to the second."""
    speeds, done = (CHUNK, 1, 5), [0] * len(texts)
    slots = [len(texts) - i for i in range(len(texts))]
    parts: list[list[Logits]] = [[] for _ in texts]
    while running := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        rows = [
            _row(engine, texts[i], done[i], done[i] + speeds[i], slots[i], adapters[i])
            for i in running
        ]
        logits = engine.forward(rows)
        at = 0
        for i, row in zip(running, rows, strict=True):
            parts[i].append(logits[at : at + row.num_logits].copy())
            at += row.num_logits
            done[i] += len(row.tokens)
    return [np.concatenate(part) for part in parts]


def rolled_back(engine: BatchedEngine, texts: Sequence[list[int]]) -> list[Logits]:
    """After half of a text comes the half of another, which is taken back."""
    found: list[Logits] = []
    for text, other in zip(texts, [*texts[1:], texts[0]], strict=True):
        half = max(1, len(text) // 2)
        first = engine.forward([_row(engine, text, 0, half, 0)]).copy()
        wrong = text[:half] + other[: len(text) - half]
        engine.forward([_row(engine, wrong, half, len(wrong), 0)])
        found.append(np.concatenate([first, alone(engine, text, half)]))
    return found


WAYS: Mapping[str, Callable[[BatchedEngine, Sequence[list[int]]], list[Logits]]] = {
    "chunks": in_chunks,
    "ragged": ragged,
    "rollback": rolled_back,
}
"""Each gives [tokens, vocab_size] of each text."""


def _row(
    engine: BatchedEngine, text: Sequence[int], start: int, stop: int, slot: int, adapter: int = 0
) -> Row:
    tokens = text[start:stop]
    return Row(slot, start, tokens, len(tokens), engine.is_long(text), adapter)
