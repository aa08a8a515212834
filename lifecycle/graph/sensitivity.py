"""How far the predictions of a model move when one of its constants alone is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lifecycle.graph.pieces import LOGITS, Floats, Pieces

_LOGITS = 1 << 25
"""Logits that are compared at most: 128 MB of them."""
_PARTS = 64
"""In which they are, one after another."""


def divergences(
    folder: Path,
    texts: Sequence[Sequence[int]],
    vocab: int,
    constants: Mapping[str, Callable[[], Floats]],
    on_done: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The mean divergence KL(float32 || changed), in nats per token, that each of `constants` causes by
    itself when its values are those that it maps to.

    The layers behind a change run for all changes in a layer together, so that one layer's weights
    and a few times the activations are in memory.

    Raises:
        StageError: there are no texts, or one is longer than the model can read.
    """
    scored = max(1, _LOGITS // (vocab * len(texts)))
    pieces = Pieces(folder, texts, scored)
    (wanted,) = _logits(pieces, 0, [{}])
    for part in np.array_split(wanted, _PARTS):
        # In place: logits are most of the memory that this takes.
        part[:] = _log_softmax(part)
    found: dict[str, float] = {}
    for at, nodes in enumerate(pieces.nodes):
        read = dict.fromkeys(name for node in nodes for name in node.input)
        names = [name for name in read if name in constants and name not in found]
        changes = [{name: constants[name]()} for name in names]
        for name, logits in zip(names, _logits(pieces, at, changes), strict=True):
            found[name] = _divergence(wanted, logits)
            if on_done is not None:
                on_done(len(found), len(constants))
        session = pieces.session(at, pieces.handed_on(at), {})
        for batch in pieces.batches:
            batch.live = pieces.step(session, at, batch, batch.live)
    return found


def _logits(
    pieces: Pieces, start: int, changes: Sequence[Mapping[str, Floats]]
) -> Iterator[Floats]:
    """The logits, [tokens, vocab], that each change of constants alone leads to, from a piece on
    that is the first to read one of them."""
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
            for i, batch in enumerate(pieces.batches):
                state[i] = pieces.step(session, at, batch, state[i])
            if at == last:
                yield np.concatenate([live.pop(LOGITS) for live in state])


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _divergence(wanted: Floats, logits: Floats) -> float:
    rows = zip(np.array_split(wanted, _PARTS), np.array_split(logits, _PARTS), strict=True)
    total = sum(float((np.exp(w) * (w - _log_softmax(x))).sum()) for w, x in rows)
    return max(total / len(wanted), 0.0)
