"""Guesses of what comes next: how often they are right, and how many of them are worth their time.

A guess costs a token of a step, and saves a step when it is right. The request chooses its tokens as it
always does, with the same random numbers, and a guess counts only if it is what was chosen: so the output
is the same with and without, greedy or drawn, but for what last bits of logits decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from lifecycle.engines.pace import Pace

_SHORTEST, _LONGEST, _MOST_PLACES = 2, 4, 8
"""Tokens at the end of a text that are looked for earlier in it, and at how many places that end alike."""
_WEIGHT = 0.15
"""Of one more guess in the share of right ones."""
_LEAST = 0.03
"""Share of the time of a token that guesses have to be expected to save: less may be an error of the measurement."""
_FINE = 6
"""Up to twice as many guesses of a step each number is weighed, then each that is a sixth part more."""
_DRIFT = 0.01
"""How fast the share returns to that of all requests while nothing is guessed: a text that was its own may
begin to quote."""


class Tally:
    """Guesses of one kind, of all requests of an engine."""

    def __init__(self) -> None:
        self.guessed = self.right = 0

    @property
    def acceptance(self) -> float:
        """The share that was right; a half before there were any."""
        return (self.right + 4) / (self.guessed + 8)

    def note(self, num_guessed: int, num_right: int) -> None:
        """Take note of how many of the tokens guessed for one request came."""
        self.guessed += num_guessed
        self.right += num_right


class Record:
    """How often guesses of one kind were right for one text."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.acceptance = tally.acceptance
        """Estimated share of guesses that are right, each given that those before it were."""

    def note(self, num_guessed: int, num_right: int) -> None:
        """Take note of how many of the guessed tokens came."""
        self._tally.note(num_guessed, num_right)
        for _ in range(num_right):
            self.acceptance += _WEIGHT * (1.0 - self.acceptance)
        if num_right < num_guessed:
            self.acceptance -= _WEIGHT * self.acceptance

    def rest(self, num_steps: int = 1) -> None:
        """Nothing was guessed in a step, or in a few."""
        self.acceptance += num_steps * _DRIFT * (self._tally.acceptance - self.acceptance)


class Lookup(Record):
    """Prompt lookup: guesses taken from what a text holds already, by the places of its last tokens."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally)
        self._ends: dict[tuple[int, int], int] = {}
        """Where two tokens have last come one after the other: the place behind them."""
        self._earlier: list[int] = []
        """Of each place, the one before it behind the same two tokens; 0 is none."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the last occurrence of what the text ends with."""
        found = self._find(tokens)
        if not found:
            return []
        guessed = list(tokens[found : found + most])
        # What is repeated over and over overlaps with its own beginning.
        period = len(tokens) - found
        while len(guessed) < most:
            guessed.append(guessed[-period])
        return guessed

    def _find(self, tokens: Sequence[int]) -> int:
        """Of the last few places that end in the same two tokens the one that has most in common with the text's end, of
        four tokens, and the last such; 0 if there is none."""
        ends, earlier, size = self._ends, self._earlier, len(tokens)
        # Before the end itself is known as a place: what follows it is what is asked.
        for end in range(len(earlier), size):
            pair = (tokens[end - 2], tokens[end - 1]) if end >= _SHORTEST else (-1, -1)
            earlier.append(ends.get(pair, 0))
            ends[pair] = end
        best = longest = 0
        place = ends.get((tokens[-2], tokens[-1]), 0) if size >= _SHORTEST else 0
        for _ in range(_MOST_PLACES):
            if not place:
                break
            count = _SHORTEST
            while count < min(_LONGEST, place) and tokens[place - count - 1] == tokens[-count - 1]:
                count += 1
            if count > longest:
                best, longest = place, count
            if longest == _LONGEST:
                break
            place = earlier[place]
        return best


class Offer(NamedTuple):
    """What could be guessed for one request."""

    acceptance: float
    most: int
    """Tokens that can be guessed."""
    is_asked: bool = False
    """Whether a draft model has to be asked for them."""


class Lengths(NamedTuple):
    """How many tokens to guess for each request."""

    lengths: list[int]
    saved: float
    """Seconds that this is expected to save for each token of the step."""


class AskCosts(NamedTuple):
    """What guesses of a draft model cost."""

    ask_seconds: Callable[[int], float]
    """To guess one more token for each of so many requests."""
    pace: Pace
    """Of steps behind the draft model, which has been in the processor's caches."""

    def step_seconds(self, num_tokens: int, pace: Pace) -> float:
        """Of a step behind the draft model with so many tokens; `pace` is that of the others."""
        seconds = pace.decode_seconds(num_tokens) or 0.0
        nearest = self.pace.nearest(num_tokens)
        if nearest is None:
            return seconds
        measured = self.pace.decode_seconds(nearest) or 0.0
        other = pace.decode_seconds(nearest) or 0.0
        # Beyond what was measured they differ as much as where it was.
        return measured if nearest == num_tokens or not other else seconds * measured / other


def choose_lengths(
    offers: Sequence[Offer], num_decode: int, pace: Pace, costs: AskCosts | None = None
) -> Lengths:
    """How many tokens to guess for each request, so that the step gives the most tokens per second.

    Args:
        offers: of the requests for which something can be guessed.
        num_decode: tokens of the step without guesses; each gives one.
        costs: of the draft model, where it may be asked.

    Of many guesses only every so many are weighed: that takes time too, and how long steps of a size take is known the
    better the fewer sizes there are.
    """
    lengths, best = [0] * len(offers), [0] * len(offers)
    seconds = pace.decode_seconds(num_decode)
    if seconds is None:
        return Lengths(best, 0.0)
    without = seconds
    plain = seconds / num_decode
    least = (1 - _LEAST) * plain
    # The likeliest guess that is left first; each is less likely than the one before it.
    left = [(-offer.acceptance, i) for i, offer in enumerate(offers) if offer.most]
    heapify(left)
    given, tokens = float(num_decode), num_decode
    asking, asked = list[int](), 0.0
    weighed = num_decode + 1
    while left:
        chance, i = left[0]
        tokens += 1
        if offers[i].is_asked and costs is not None:
            if lengths[i] == len(asking):
                asking.append(0)
            before = costs.ask_seconds(asking[lengths[i]])
            asking[lengths[i]] += 1
            asked += costs.ask_seconds(asking[lengths[i]]) - before
        lengths[i] += 1
        given -= chance
        if lengths[i] < offers[i].most:
            heapreplace(left, (chance * offers[i].acceptance, i))
        else:
            heappop(left)
        if tokens < weighed and left:
            continue
        weighed = tokens + max((tokens - num_decode) // _FINE, 1)
        if costs is not None and asking:
            seconds = costs.step_seconds(tokens, pace)
        else:
            seconds = pace.decode_seconds(tokens) or 0.0
        # No step with guesses takes less than one without: it was measured when the machine was less busy.
        seconds = max(seconds, without)
        if (seconds + asked) / given < least:
            least, best = (seconds + asked) / given, lengths.copy()
    return Lengths(best, plain - least if any(best) else 0.0)
