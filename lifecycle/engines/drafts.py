"""Guesses of what comes next, taken from what the text holds already (prompt lookup).

A guess costs a token of a step, and saves a step when it is right. The request chooses its tokens as it
always does, with the same random numbers, and a guess counts only if it is what was chosen: so the output
is the same with and without, greedy or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from lifecycle.engines.pace import Pace

_LENGTHS = (4, 3, 2)
"""Tokens at the end of a text that are looked for earlier in it, the longest first."""
_WEIGHT = 0.15
"""Of one more guess in the share of right ones."""
_DRIFT = 0.01
"""How fast the share returns to that of all requests while nothing is guessed: a text that was its own may
begin to quote."""


class Tally:
    """Guesses of all requests of an engine."""

    def __init__(self) -> None:
        self.guessed = self.right = 0

    @property
    def acceptance(self) -> float:
        """The share that was right; a half before there were any."""
        return (self.right + 4) / (self.guessed + 8)


class Lookup:
    """The places of the last tokens of one text, and how often guesses from there were right."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.acceptance = tally.acceptance
        """Estimated share of guesses that are right, each given that those before it were."""
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in _LENGTHS]
        self._size = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the last occurrence of what the text ends with."""
        found: int | None = None
        for length, places in zip(_LENGTHS, self._places, strict=True):
            # Before the end itself is known as a place: what follows it is what is asked.
            for end in range(max(self._size, length), len(tokens)):
                places[tuple(tokens[end - length : end])] = end
            if found is None and len(tokens) >= length:
                found = places.get(tuple(tokens[-length:]))
        self._size = len(tokens)
        if found is None:
            return []
        guessed = list(tokens[found : found + most])
        # What is repeated over and over overlaps with its own beginning.
        period = len(tokens) - found
        while len(guessed) < most:
            guessed.append(guessed[-period])
        return guessed

    def note(self, num_guessed: int, num_right: int) -> None:
        """Take note of how many of the guessed tokens came."""
        self._tally.guessed += num_guessed
        self._tally.right += num_right
        for _ in range(num_right):
            self.acceptance += _WEIGHT * (1.0 - self.acceptance)
        if num_right < num_guessed:
            self.acceptance -= _WEIGHT * self.acceptance

    def rest(self) -> None:
        """Nothing was guessed in a step."""
        self.acceptance += _DRIFT * (self._tally.acceptance - self.acceptance)


def choose_lengths(
    acceptances: Sequence[float], most: Sequence[int], num_decode: int, pace: Pace
) -> list[int]:
    """How many tokens to guess for each request, so that the step gives the most tokens per second.

    Args:
        acceptances: of the requests that have guesses.
        most: how many each has.
        num_decode: tokens of the step without guesses; each gives one.
    """
    lengths, best = [0] * len(most), [0] * len(most)
    seconds = pace.decode_seconds(num_decode)
    if seconds is None:
        return best
    chances, given = list(acceptances), float(num_decode)
    highest = given / seconds
    for tokens in range(num_decode + 1, num_decode + sum(most) + 1):
        # The likeliest guess that is left; each is less likely than the one before it.
        i = max((i for i in range(len(most)) if lengths[i] < most[i]), key=lambda i: chances[i])
        lengths[i] += 1
        given += chances[i]
        chances[i] *= acceptances[i]
        seconds = pace.decode_seconds(tokens)
        assert seconds is not None
        if given / seconds > highest:
            highest, best = given / seconds, lengths.copy()
    return best
