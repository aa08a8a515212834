"""How long steps take on this machine, as seen so far: what decides how much a step may carry."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from math import sqrt

_WEIGHT, _PROMPT_WEIGHT = 0.2, 0.4
"""Of a new measurement in the running mean; a prompt's tokens cost more the further it is."""
_NEWEST, _LONG_AGO, _DOUBT = 0.5, 16, 0.05
"""Of a new measurement where so many steps were made since the last one, or where that was of texts so much longer or
shorter that what steps take now may be wrong by such a share."""
_OUTLIER, _SLOW = 2.0, 1.25
"""A measurement counts as at most so many times the mean, one of a usual decoding step as the second: a machine may be
busy for a moment. Where one such step made others seem long, guesses would seem to save them."""
_SLOPE_WEIGHT = 0.002
"""Of a new measurement in what longer texts cost, which changes little; noise is most of what a single one says."""
_NOISE_WEIGHT = 0.02
"""Of how far a new measurement is off."""
EVERY = 4
"""How many steps of an engine pass at least until one of a size is measured again: that takes 0.4 % of a short one. A
draft model is asked by smaller differences, so with one each step is."""
_FAR = 4.0
"""How many times as long or short other texts may make a step at most, whatever measurements say."""
_OLD, _LOOK_EVERY = 512, 64
"""Measured steps after which what none of them has confirmed is forgotten, and between two looks for such."""
_PLANNED, _LEAST_PLANNED, _MOST_PLANNED = 0.5, 0.35, 0.8
"""Of the time by which prompts may make a step longer, what is planned for at first, and between which parts that moves
with the machine:"""
_COPIES = 2.0
"""How many times that time copies of computed prompts may take: they spare far more, to those that wait for a token too."""
_BACK, _ONE_IN = 0.02, 200
"""it falls by so much of it with each step that took longer than may be, and rises so slowly that one in so many does. How
far one was off by chance no plan can change: those beyond twice the time say nothing."""
_NEAR, _FEW = 0.75, 3
"""Of the tokens that were planned for: a step that has so many is one that was; and tokens that any step may have."""
_LARGE, _LEAST = 32, 16
"""Tokens of prompts: of a step by which their own time is told, twice as many beside others that decode; and the least
of a step where they have a graph of their own."""


@dataclass(slots=True)
class _Mean:
    """Of steps, and of the tokens that stood before them."""

    seconds: float
    context: float

    def note(self, seconds: float, context: float, weight: float) -> None:
        self.seconds += weight * (seconds - self.seconds)
        self.context += weight * (context - self.context)


@dataclass(slots=True)
class _Steps(_Mean):
    """Those of one size."""

    at: float
    """Seconds of all steps when they were measured last."""
    before: _Mean
    """A mean that always follows slowly: the farther back it is, the better a new measurement says what texts cost."""


class _Slope:
    """By how much steps take longer for each token that stands before them, as far as that can be told from noise."""

    def __init__(self) -> None:
        self._products = self._squares = self._errors = self._count = self._mean = 0.0
        self.error = 0.0
        """Two standard errors of it."""
        self.value = 0.0
        """Seconds for a token, or less: two standard errors below what was measured."""

    def note(self, tokens: float, seconds: float) -> None:
        """A step had so many tokens more before it than others, and took so much longer."""
        if abs(tokens) < 1:
            # Where windows are full texts grow no more: what is left of a difference is an error of the computation.
            return
        error = seconds - self._mean * tokens
        kept = 1 - _SLOPE_WEIGHT
        self._products = kept * self._products + tokens * seconds
        self._squares = kept * self._squares + tokens * tokens
        self._errors = kept * self._errors + error * error
        self._count = kept * self._count + 1
        self._mean = self._products / self._squares
        self.error = 2 * sqrt(self._errors / self._count / self._squares)
        self.value = max(self._mean - self.error, 0.0)


class Pace:
    """Running means: of decoding steps by their number of tokens, and of what prompts add to a step, which is
    so much for any token and so much for each."""

    def __init__(
        self,
        max_stall: float | None = None,
        *,
        has_prompt_graph: bool = False,
        every: int = 1,
    ) -> None:
        """
        Args:
            max_stall: how many times as long prompts may make a step; None is no bound.
            has_prompt_graph: prompts have a graph of their own, and share no weights with what decodes
                beside them.
            every: how many steps pass at least until one of a size is measured again.
        """
        self.max_stall = max_stall
        self._planned = _PLANNED
        self._room: int | None = None
        """Tokens of prompts that the next step was planned for, if that is bounded."""
        self._every = every
        self._has_prompt_graph = has_prompt_graph
        self._decode: dict[int, _Steps] = {}
        self.context: float = 0
        """Tokens that stand before those of the next step: keys and values are read of each."""
        self._context_seconds = _Slope()
        self._known: list[int] = []
        self._num_noted = 0
        self._last: dict[int, int] = {}
        """When each was measured last, in steps that were noted."""
        self._prompt_token: float | None = None
        self._is_told = False
        """Whether that is from large steps: in small ones a token's own time cannot be told from the first's."""
        self._prompt_base = 0.0
        """What the first token adds beyond its own time: attention reads the whole text for it, products of a few
        rows take other kernels, a graph for prompts reads its weights. It follows the prompts as they grow."""
        self._first: tuple[int, float] | None = None
        """Tokens and seconds of the last step of prompts alone before any other."""
        self.noise = 0.0
        """By what share of it a decoding step takes longer or shorter than expected, on average."""
        self.seconds = 0.0
        """Of all steps together."""

    def note(self, num_decode: int, num_prompt: int, seconds: float) -> None:
        """Take note of a step with so many tokens of decoding requests, drafts among them, and of
        prompts."""
        self.seconds += seconds
        if num_prompt:
            self._note_prompt(num_decode, num_prompt, seconds)
            return
        known = self._decode.get(num_decode)
        if known is None:
            insort(self._known, num_decode)
        elif self._every > 1:
            # By the shorter: what was measured in a bad moment would stay for long.
            usual = min(known.seconds, seconds)
            if self.seconds - known.at < (self._every - 0.5) * usual:
                return
        self._note_decode(num_decode, seconds)
        self._last[num_decode] = self._num_noted
        self._num_noted += 1
        if self._num_noted % _LOOK_EVERY == 0:
            self._forget_old()
        if self._first is not None:
            first, self._first = self._first, None
            self._note_prompt(0, *first)

    def _note_decode(self, num_decode: int, seconds: float) -> None:
        known = self._decode.get(num_decode)
        if known is None:
            before = _Mean(seconds, self.context)
            self._decode[num_decode] = _Steps(seconds, self.context, self.seconds, before)
            return
        is_usual = self.seconds - known.at <= _LONG_AGO * known.seconds
        is_usual = is_usual and not self._is_doubted(known)
        expected = self._now(known)
        if is_usual and expected:
            off = min(abs(seconds - expected) / expected, _SLOW - 1)
            self.noise += _NOISE_WEIGHT * (off - self.noise)
        seconds = min(seconds, (_SLOW if is_usual else _OUTLIER) * expected)
        before = known.before
        self._context_seconds.note(self.context - before.context, seconds - before.seconds)
        before.note(seconds, self.context, _WEIGHT)
        known.note(seconds, self.context, _WEIGHT if is_usual else _NEWEST)
        known.at = self.seconds

    def is_doubted(self, num_decode: int) -> bool:
        """Whether steps with so many decoding tokens were measured with texts so much longer or shorter that what they
        take now cannot be told."""
        mean = self._decode.get(num_decode)
        return mean is not None and self._is_doubted(mean)

    def _is_doubted(self, mean: _Mean) -> bool:
        wrong = self._context_seconds.error * abs(self.context - mean.context)
        return wrong > _DOUBT * mean.seconds

    def _now(self, mean: _Mean) -> float:
        """What a step takes with the texts as long as they are."""
        more = self._context_seconds.value * (self.context - mean.context)
        return min(max(mean.seconds + more, mean.seconds / _FAR), mean.seconds * _FAR)

    def _forget_old(self) -> None:
        """What was measured on a busy machine would never be tried again."""
        kept = [n for n in self._known if self._num_noted - self._last[n] <= _OLD]
        self._known = kept
        self._decode = {n: self._decode[n] for n in kept}
        self._last = {n: self._last[n] for n in kept}

    def _note_prompt(self, num_decode: int, num_prompt: int, seconds: float) -> None:
        base, tokens = 0.0, num_prompt
        if num_decode or not self._has_prompt_graph:
            # The first token of a step that has no other costs what the step does.
            known = self.decode_seconds(num_decode or 1)
            if known is None:
                self._first = (num_prompt, seconds)
                return
            base, tokens = known, num_prompt if num_decode else num_prompt - 1
        if not tokens:
            return
        more = max(seconds - base, 0.0)
        if num_decode and self.max_stall is not None and self._is_planned(num_prompt):
            self._note_stall(more / ((self.max_stall - 1.0) * base))
        is_large = tokens >= (2 * _LARGE if num_decode else _LARGE)
        if is_large or not self._is_told:
            # What small steps have told ends with the first large one.
            before = self._prompt_token if self._is_told or not is_large else None
            self._is_told |= is_large
            if more:
                self._prompt_token = _mean(before, more / tokens, _PROMPT_WEIGHT)
            return
        if num_decode:
            own = self.prompt_token_seconds * tokens
            more = min(more, _OUTLIER * (own + self._prompt_base))
            self._prompt_base += _PROMPT_WEIGHT * (max(more - own, 0.0) - self._prompt_base)

    def _is_planned(self, num_prompt: int) -> bool:
        """Whether a step took as much of prompts as was planned: what is left of one, or the least that any step takes,
        says nothing of plans."""
        room = self._room
        return room is not None and _NEAR * room <= num_prompt <= room

    def _note_stall(self, share: float) -> None:
        """Prompts have made a step longer, by such a share of the time that is allowed."""
        if share <= 2.0:
            change = -_BACK if share > 1.0 else _BACK / _ONE_IN
            self._planned = min(max(self._planned + change, _LEAST_PLANNED), _MOST_PLANNED)

    def decode_seconds(self, num_tokens: int) -> float | None:
        """Of a step with so many decoding tokens: measured, or between the nearest measurements, or
        beyond the last one by what a token of a prompt takes, so that it is tried. None before the
        first."""
        if not self._known:
            return None
        if num_tokens in self._decode:
            return self._now(self._decode[num_tokens])
        place = bisect_left(self._known, num_tokens)
        low, high = max(place - 1, 0), min(place, len(self._known) - 1)
        if low == high:
            more = max(num_tokens - self._known[low], 0)
            return self._now(self._decode[self._known[low]]) + more * self.prompt_token_seconds
        left, right = self._known[low], self._known[high]
        part = (num_tokens - left) / (right - left)
        least, most = self._now(self._decode[left]), self._now(self._decode[right])
        return least + part * (most - least)

    def nearest(self, num_tokens: int) -> int | None:
        """The nearest number of decoding tokens that was measured, or lies between two that were; None before the
        first."""
        if not self._known:
            return None
        return min(max(num_tokens, self._known[0]), self._known[-1])

    @property
    def prompt_token_seconds(self) -> float:
        """What a token of a prompt adds to a step; 0 before it is known."""
        return self._prompt_token or 0.0

    def prompt_room(self, num_decode: int) -> int | None:
        """Tokens of prompts beside so many decoding ones that make a step hardly ever more than `max_stall` times
        as long; None if that is not bounded, or not known yet."""
        self._room = None
        more = self.stall_seconds(num_decode)
        if more is None or self._prompt_token is None:
            return None
        room = int((more - self._prompt_base) / self._prompt_token)
        # Fewer would read all weights of a graph for next to nothing.
        least = _LEAST if self._has_prompt_graph else 0
        if room > max(least, _FEW):
            self._room = room
        return max(room, least)

    def stall_seconds(self, num_decode: int) -> float | None:
        """By how much a step with so many decoding tokens is planned to be longer at most; None as `prompt_room`."""
        most = self._most_seconds(num_decode)
        return None if most is None else self._planned * most

    def copy_seconds(self, num_decode: int) -> float | None:
        """What copies may take before a step with so many decoding tokens; None as `prompt_room`."""
        most = self._most_seconds(num_decode)
        return None if most is None else _COPIES * most

    def _most_seconds(self, num_decode: int) -> float | None:
        base = self.decode_seconds(num_decode)
        return None if self.max_stall is None or base is None else (self.max_stall - 1.0) * base


def _mean(mean: float | None, value: float, weight: float = _WEIGHT) -> float:
    if mean is None:
        return value
    return mean + weight * (min(value, _OUTLIER * mean) - mean)
