"""How far the predictions of a model move when one of its constants alone is changed."""

# onnxruntime ships no type information.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from lifecycle.graph.pieces import LOGIT_INDEX, Floats, Pieces, Values
from lifecycle.graph.scratch import mapped

_LOGITS = 1 << 25
"""Logits that are compared at most: 128 MB of them, which lie in a file."""


def divergences(
    folder: Path,
    texts: Sequence[Sequence[int]],
    vocab: int,
    constants: Mapping[str, Callable[[], Floats]],
    scratch: Path | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The mean divergence KL(float32 || changed), in nats per token, that each of `constants` causes by
    itself when its values are those that it maps to.

    The layers behind a change run for all changes in a layer together, so that one layer's weights
    and a few times the activations of a batch are in memory. What is kept of all texts lies in files in `scratch`, by
    default where the system keeps such files.

    Raises:
        StageError: there are no texts, or one is longer than the model can read.
    """
    scored = max(1, _LOGITS // (vocab * len(texts)))
    pieces = Pieces(folder, texts, scored, scratch)
    (plain,) = _logits(pieces, 0, [{}])
    count = sum(len(batch.inputs[LOGIT_INDEX]) for batch in pieces.batches)
    parts = map(_log_softmax, plain)
    wanted = mapped(parts, (count, vocab), np.dtype(np.float32), scratch)
    found: dict[str, float] = {}
    for at, nodes in enumerate(pieces.nodes):
        read = dict.fromkeys(name for node in nodes for name in node.input)
        names = [name for name in read if name in constants and name not in found]
        changes = [{name: constants[name]()} for name in names]
        for name, logits in zip(names, _logits(pieces, at, changes), strict=True):
            found[name] = _divergence(wanted, logits)
            if on_done is not None:
                on_done(len(found), len(constants))
        if at < len(pieces.nodes) - 1:
            session = pieces.session(at, pieces.handed_on(at), {})
            for batch in pieces.batches:
                batch.live = pieces.step(session, at, batch, batch.live)
    return found


def _logits(
    pieces: Pieces, start: int, changes: Sequence[Mapping[str, Floats]]
) -> Iterator[Iterable[Floats]]:
    """The logits that each change of constants alone leads to, from a piece on that is the first to read
    one of them; some tokens at a time, [tokens, vocab]."""
    if not changes:
        return
    states = [[batch.live for batch in pieces.batches] for _ in changes]
    last = len(pieces.nodes) - 1
    for at in range(start, last + 1):
        read = {name for node in pieces.nodes[at] for name in node.input}
        plain = None
        for change, state in zip(changes, states, strict=True):
            if read.isdisjoint(change):
                session = plain = plain or pieces.session(at, pieces.handed_on(at), {})
            else:
                session = pieces.session(at, pieces.handed_on(at), change)
            if at == last:
                yield _logits_of(pieces, session, state)
                continue
            for i, batch in enumerate(pieces.batches):
                state[i] = pieces.step(session, at, batch, state[i])


def _logits_of(
    pieces: Pieces, session: InferenceSession, states: Sequence[Values]
) -> Iterator[Floats]:
    for batch, live in zip(pieces.batches, states, strict=True):
        yield from pieces.logits(session, batch, live)


def _log_softmax(logits: Floats) -> Floats:
    """In place, as new memory of this size takes as long to get as all that is computed in it."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def _divergence(wanted: Floats, logits: Iterable[Floats]) -> float:
    total, done = 0.0, 0
    for part in logits:
        log_p, log_q = wanted[done : done + len(part)], _log_softmax(part)
        terms = np.subtract(log_p, log_q, out=log_q)
        terms *= np.exp(log_p)
        total += float(terms.sum())
        done += len(part)
    return max(total / len(wanted), 0.0)
