"""Text from tokens as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class StreamDecoder:
    """Turns one request's tokens into text, piece by piece.

    All pieces together are exactly `decode(ids)`, and no piece ends inside a character. Each
    token is decoded behind those of the last piece, because a token alone may lose the space
    before it. Byte tokens such as `<0xE2>` are held until a run of them ends: one bad byte
    changes what the whole run stands for.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        """`context` are tokens of whole characters that the first one comes behind."""
        self._tokenizer = tokenizer
        self._skip = skip
        self._context = list(context)
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; often empty."""
        token = None if token_id in self._skip else self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        if _BYTE.fullmatch(token):
            return ""
        text = self._decode(self._context + self._pending)
        if len(text) <= len(self._context_text) or text.endswith(_REPLACEMENT):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The text that was held back; an incomplete character gives U+FFFD."""
        if not self._pending:
            return ""
        return self._advance(self._decode(self._context + self._pending))

    def _advance(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
