"""The place of one answer in its grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import thread_time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lifecycle.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Budget:
    """Processor time of the engine's thread that one answer may take; all others wait for it."""

    def __init__(self, burst_seconds: float, token_seconds: float) -> None:
        """`burst_seconds` at a time, beyond `token_seconds` for each token."""
        self._most, self._token_seconds = burst_seconds, token_seconds
        self._left = burst_seconds

    def earn(self) -> None:
        """A token has come."""
        self._left = min(self._left + self._token_seconds, self._most)

    def spend(self, begun: float) -> None:
        """Count what has been done since a time of `thread_time`.

        Raises:
            RequestError: it was too much.
        """
        self._left -= thread_time() - begun
        if self._left < 0:
            raise RequestError(
                "the grammar takes too long to follow while the answer is written; use one in which a text "
                "can be read in fewer ways, such as lists by '*' and not by rules that name themselves twice"
            )


class Guard:
    """A second grammar that an answer matches, made of a regular expression `(…)*` that knows where each part ends:
    before each part the same tokens may come, and their mask is computed once."""

    def __init__(self, matcher: LLMatcher, first: NDArray[np.uint8]) -> None:
        """`first` is the mask at its beginning, as bits."""
        self._matcher, self._first = matcher, first

    def copy(self) -> Guard:
        """One more at the same place; microseconds."""
        return Guard(self._matcher.deep_copy(), self._first)

    def bits(self) -> NDArray[np.uint8]:
        """The mask of the next token, as bits."""
        if self._matcher.is_accepting():
            return self._first
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint8)

    def accept(self, token: int) -> bool:
        """Go on by a token; False if it may not come."""
        return self._matcher.consume_token(token)


class GrammarConstraint:
    """A `Constraint` by llguidance; made by `Grammar.constraint`, used by one request."""

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        ends: frozenset[int],
        foreign_ends: frozenset[int],
        on_failure: Callable[[], None],
        budget: Budget,
        guard: Guard | None = None,
    ) -> None:
        """
        Args:
            ends: the tokens that end the request.
            foreign_ends: tokens that the grammar ends with but the request does not.
            on_failure: called if the grammar outgrows its limits; the next one must be made anew.
            guard: what the answer matches besides; used by this one only.
        """
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends
        self._end_ids = np.array(sorted(ends), dtype=np.intp)
        self._foreign_ids = np.array(sorted(foreign_ends), dtype=np.intp)
        self._on_failure = on_failure
        self._budget = budget
        self._guard = guard
        self._is_ended = False

    def mask(self) -> NDArray[np.bool_]:
        begun = thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._failure()
        if self._guard is not None:
            bits = bits & self._guard.bits()
        self._budget.spend(begun)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        mask[self._foreign_ids] = False
        mask[self._end_ids] = self._matcher.is_accepting()
        return mask

    def accept(self, token: int) -> None:
        # Any token can end a request, but the grammar knows those of the model only.
        if token in self._ends:
            self._is_ended = True
            return
        begun = thread_time()
        if not self._matcher.consume_token(token):
            raise self._failure()
        if self._guard is not None and not self._guard.accept(token):
            raise self._failure()
        self._budget.earn()
        self._budget.spend(begun)

    def forced(self) -> Sequence[int]:
        if self._is_ended:
            return ()
        begun = thread_time()
        tokens = self._matcher.compute_ff_tokens()
        if self._matcher.is_error():
            raise self._failure()
        self._budget.spend(begun)
        # What would end the request is not text of the answer.
        first_end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[:first_end]

    @property
    def is_complete(self) -> bool:
        return self._is_ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def _failure(self) -> RequestError:
        self._on_failure()
        # The library's own text may hold a part of the answer, and this one is logged.
        return RequestError(
            "the grammar has outgrown its limits while the answer was "
            "written; use one with fewer alternatives, shorter bounds or less nesting"
        )
