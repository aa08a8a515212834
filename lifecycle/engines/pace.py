"""How long steps take on this machine, as seen so far: what decides how much a step may carry."""

from __future__ import annotations

from bisect import bisect_left, insort

_WEIGHT, _PROMPT_WEIGHT = 0.2, 0.4
"""Of a new measurement in the running mean; a prompt's tokens cost more the further it is."""
_OUTLIER = 2.0
"""A measurement counts as at most so many times the mean: a machine may be busy for a moment."""
_LARGE, _LEAST = 64, 16
"""Tokens of prompts, where they have a graph of their own: by which its speed is told, and of a step."""


class Pace:
    """Running means: of decoding steps by their number of tokens, and of what a token of a prompt adds."""

    def __init__(self, *, has_prompt_graph: bool = False) -> None:
        """With a graph of their own, prompts cost something before their first token: that graph's weights
        have to be read too."""
        self._has_prompt_graph = has_prompt_graph
        self._prompt_base: float | None = None
        self._decode: dict[int, float] = {}
        self._known: list[int] = []
        self._prompt_token: float | None = None
        self._first: tuple[int, float] | None = None
        """Tokens and seconds of the last step of prompts alone before any other."""
        self.seconds = 0.0
        """Of all steps together."""

    def note(self, num_decode: int, num_prompt: int, seconds: float) -> None:
        """Take note of a step with so many tokens of decoding requests, drafts among them, and of
        prompts."""
        self.seconds += seconds
        if num_prompt:
            self._note_prompt(num_decode, num_prompt, seconds)
            return
        if num_decode not in self._decode:
            insort(self._known, num_decode)
        self._decode[num_decode] = _mean(self._decode.get(num_decode), seconds)
        if self._first is not None:
            first, self._first = self._first, None
            self._note_prompt(0, *first)

    def _note_prompt(self, num_decode: int, num_prompt: int, seconds: float) -> None:
        # The first token of a step that has no other costs what the step does.
        if self._has_prompt_graph:
            self._note_prompt_graph(num_decode, num_prompt, seconds)
            return
        base = self.decode_seconds(num_decode or 1)
        more = num_prompt if num_decode else num_prompt - 1
        if base is None:
            self._first = (num_prompt, seconds)
        elif more and seconds > base:
            self._prompt_token = _mean(self._prompt_token, (seconds - base) / more, _PROMPT_WEIGHT)

    def _note_prompt_graph(self, num_decode: int, num_prompt: int, seconds: float) -> None:
        # In large rows the base is little; in small ones it is what remains.
        more = seconds - (self.decode_seconds(num_decode) or 0.0 if num_decode else 0.0)
        if more <= 0:
            return
        if num_prompt >= _LARGE:
            self._prompt_token = _mean(self._prompt_token, more / num_prompt, _PROMPT_WEIGHT)
        elif self._prompt_token is not None:
            base = max(more - self._prompt_token * num_prompt, 0.0)
            self._prompt_base = _mean(self._prompt_base, base) if self._prompt_base else base

    def decode_seconds(self, num_tokens: int) -> float | None:
        """Of a step with so many decoding tokens: measured, or between the nearest measurements, or
        beyond the last one by what a token of a prompt takes, so that it is tried. None before the
        first."""
        if not self._known:
            return None
        if num_tokens in self._decode:
            return self._decode[num_tokens]
        place = bisect_left(self._known, num_tokens)
        low, high = max(place - 1, 0), min(place, len(self._known) - 1)
        if low == high:
            more = max(num_tokens - self._known[low], 0)
            return self._decode[self._known[low]] + more * self.prompt_token_seconds
        left, right = self._known[low], self._known[high]
        part = (num_tokens - left) / (right - left)
        return self._decode[left] + part * (self._decode[right] - self._decode[left])

    @property
    def prompt_token_seconds(self) -> float:
        """What a token of a prompt adds to a step; 0 before it is known."""
        return self._prompt_token or 0.0

    def prompt_room(self, num_decode: int, max_stall: float) -> int | None:
        """Tokens of prompts beside so many decoding ones that make a step at most `max_stall` times
        as long; None if that is not known yet."""
        base = self.decode_seconds(num_decode)
        if base is None or self._prompt_token is None:
            return None
        more = (max_stall - 1.0) * base
        if self._has_prompt_graph:
            # Fewer would read all its weights for next to nothing.
            return max(int((more - (self._prompt_base or 0.0)) / self._prompt_token), _LEAST)
        return int(more / self._prompt_token)


def _mean(mean: float | None, value: float, weight: float = _WEIGHT) -> float:
    if mean is None:
        return value
    return mean + weight * (min(value, _OUTLIER * mean) - mean)
