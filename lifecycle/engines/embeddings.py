"""One vector for each text, of the hidden states of its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import HiddenBackend, Row
from lifecycle.engines.limits import check_tokens
from lifecycle.engines.slot_room import SlotRoom
from lifecycle.errors import EngineError, RequestError

Pooling = Literal["mean", "last", "cls"]


def check_texts(prompts: Sequence[Sequence[int]], *, most: int, vocab_size: int) -> list[list[int]]:
    """The token ids of `prompts`.

    Raises:
        RequestError: one is empty or too long, or has a token that does not exist.
    """
    texts: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        try:
            texts.append(check_tokens(prompt, most=most, vocab_size=vocab_size))
        except RequestError as error:
            raise RequestError(f"prompt {number}: {error}") from None
    return texts


def embed_texts(
    texts: Sequence[Sequence[int]], pooling: Pooling, normalize: bool, room: SlotRoom
) -> NDArray[np.float32]:
    """The vectors of `texts`, [n, hidden_size], as `Engine.embed` defines them.

    Raises:
        RequestError: there is no such pooling.
        EngineError: the model gives no hidden states, the runtime failed, or a text has states that are
            no finite numbers.
    """
    if pooling not in get_args(Pooling):
        raise RequestError(f"pooling is {pooling!r}; it must be one of 'mean', 'last', 'cls'")
    if not isinstance(room.backend, HiddenBackend):
        raise EngineError("this engine gives no hidden states")
    if pooling == "cls":
        # Nothing that comes later reaches the first token.
        texts = [text[:1] for text in texts]
    vectors = np.zeros((len(texts), room.backend.hidden_size), np.float64)
    waiting = deque(_Text(*pair, room) for pair in enumerate(texts))
    running: list[_Text] = []
    free = list(range(room.num_slots))
    try:
        while waiting or running:
            held = sum(len(text.tokens) for text in running)
            # One may be longer than the cache, of a model whose layers all have windows.
            while (
                waiting
                and free
                and (not running or held + len(waiting[0].tokens) <= room.max_tokens)
            ):
                text = waiting.popleft()
                # The lowest first: a step computes all up to the highest in use.
                text.slot = free.pop(0)
                held += len(text.tokens)
                running.append(text)
            _step(running, pooling == "mean", room.backend, vectors)
            for text in running:
                room.forget_passed(text.slot, text.num_computed)
            for text in [text for text in running if text.num_computed == len(text.tokens)]:
                running.remove(text)
                room.forget(text.slot)
                free = sorted([*free, text.slot])
    finally:
        for text in running:
            room.forget(text.slot)
    return _finished(vectors, normalize)


class _Text:
    """A text on its way through a slot."""

    def __init__(self, number: int, tokens: Sequence[int], room: SlotRoom) -> None:
        self.number, self.tokens, self.slot, self.num_computed = number, tokens, -1, 0
        self._chunk, self._is_long = room.chunk, room.is_long(len(tokens))

    def next_row(self, is_mean: bool) -> Row:
        """Its next chunk, with the states of all tokens or of the very last one."""
        start = self.num_computed
        tokens = self.tokens[start : start + self._chunk]
        self.num_computed += len(tokens)
        is_last = self.num_computed == len(self.tokens)
        count = len(tokens) if is_mean else int(is_last)
        return Row(self.slot, start, tokens, count, self._is_long)


def _step(
    texts: Sequence[_Text], is_mean: bool, backend: HiddenBackend, vectors: NDArray[np.float64]
) -> None:
    rows = [text.next_row(is_mean) for text in texts]
    states = backend.hidden_states(rows)
    start = 0
    for text, row in zip(texts, rows, strict=True):
        part = states[start : start + row.num_logits].sum(axis=0, dtype=np.float64)
        vectors[text.number] += part / len(text.tokens) if is_mean else part
        start += row.num_logits


def _finished(vectors: NDArray[np.float64], normalize: bool) -> NDArray[np.float32]:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise EngineError(f"prompt {finite.argmin()}: the model's output is not a finite number")
    if normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.where(lengths > 0, lengths, 1)
    return vectors.astype(np.float32)
