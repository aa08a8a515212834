"""From tokens to the text that a client sees: characters whole, stop strings cut off."""

from __future__ import annotations

from collections.abc import Sequence

from lifecycle.data.chat import ChatTokenizer
from lifecycle.data.stream import StreamDecoder


class StopMatcher:
    """Ends a text before the first stop string, wherever the borders of its pieces are.

    The first stop string is the one that is complete first; of several that are complete at the
    same character, the longest. The end of a text that may be the beginning of a stop string is
    held back until that is clear.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; the text has ended then."""

    def push(self, piece: str) -> str:
        """The text that can be shown after this piece."""
        if self.stopped:
            return ""
        text = self._held + piece
        cut = self._first_stop(text)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        shown = len(text) - self._length_to_hold(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where the text before the first stop string ends."""
        found = [(text.find(stop), stop) for stop in self._stops]
        complete = [(start + len(stop), start) for start, stop in found if start >= 0]
        return min(complete)[1] if complete else None

    def _length_to_hold(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class AnswerText:
    """The text of one answer as its tokens come."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._matcher.stopped

    def push(self, token_id: int) -> str:
        """The text that can be shown after this token; often empty."""
        return self._matcher.push(self._decoder.push(token_id))

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        return self._matcher.push(self._decoder.finish()) + self._matcher.finish()


class TokenTexts:
    """The text of single tokens, for reports about them."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        # Some tokenisers drop the space that a text's first token begins with, so a token is
        # decoded behind another one.
        self._before = tokenizer.encode("a", add_special_tokens=False)
        self._length = len(tokenizer.decode(self._before))
        self._known: dict[int, str] = {}

    def stream(self) -> StreamDecoder:
        """What tells the text of many tokens, one after another."""
        return self._tokenizer.stream()

    def __call__(self, token_id: int) -> str:
        """A part of a character, which has no text of its own, gives U+FFFD."""
        if token_id not in self._known:
            text = self._tokenizer.decode([*self._before, token_id], skip_special_tokens=False)
            self._known[token_id] = text[self._length :]
        return self._known[token_id]
