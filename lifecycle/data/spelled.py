"""Special tokens that a message only spells: `<|im_end|>` in it is text, and ends no turn."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, cast

from tokenizers import Tokenizer

from lifecycle.data.supervision import Encoded

_MARK = "\ue0f2"
_MARKED = re.compile(f"{_MARK}.", re.DOTALL)


class SpelledTokens:
    """Tells the special tokens that a template writes from those that a message spells.

    A mark goes before each of the latter (and, as an escape, before each mark that is already
    there) while the template is rendered. Behind a mark, a special token becomes the tokens of
    its text. Everything else is tokenised as it would be without marks.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        special = {id: token.content for id, token in added.items() if token.special}
        self.ids = frozenset(special)
        """All special tokens."""
        longest_first = sorted({*special.values(), _MARK}, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)))

    def mark(self, value: Any) -> Any:
        """A value that is given to a template, its texts marked however deep they lie."""
        match value:
            case str():
                return self._spelled.sub(_MARK + r"\g<0>", value)
            case Mapping():
                items = cast("Mapping[Any, Any]", value).items()
                return {key: self.mark(inner) for key, inner in items}
            case list() | tuple():
                return [self.mark(inner) for inner in cast("Iterable[Any]", value)]
            case _:
                return value

    def encode(self, marked: str) -> Encoded:
        """The tokens of a rendered text; offsets count its marks."""
        text, marks = _unmarked(marked)
        # Unlike `encode`, a batch lets Python's other threads run meanwhile.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        encoded = Encoded(encoding.ids, cast("list[tuple[int, int]]", encoding.offsets))
        return self._as_text(text, marks, encoded) if marks else encoded

    def _as_text(self, text: str, marks: list[int], encoded: Encoded) -> Encoded:
        result = Encoded([], [])
        for id, (first, behind) in zip(encoded.ids, encoded.offsets, strict=True):
            before, within = bisect_right(marks, first), bisect_left(marks, behind)
            spelled = id in self.ids and bisect_left(marks, first) < within
            ids = self._parts(text[first:behind]) if spelled else [id]
            result.ids.extend(ids)
            result.offsets.extend([(first + before, behind + within)] * len(ids))
        return result

    def _parts(self, token: str) -> list[int]:
        """A special token's text in two, neither of which the tokeniser takes for it."""
        parts = self._tokenizer.encode_batch([token[:1], token[1:]], add_special_tokens=False)
        return [id for part in parts for id in part.ids]


def _unmarked(text: str) -> tuple[str, list[int]]:
    """A text without its marks, and where in it they were."""
    marks = [found.start() for found in _MARKED.finditer(text)]
    borders = zip([0, *(mark + 1 for mark in marks)], [*marks, len(text)], strict=True)
    plain = "".join(text[begin:end] for begin, end in borders)
    return plain, [mark - number for number, mark in enumerate(marks)]
