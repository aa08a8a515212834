"""The one text layer of training, evaluation and serving: conversations to tokens and back.

It needs neither torch nor transformers, and gives the token ids that transformers'
`AutoTokenizer` gives, but for special tokens that a message spells: those are text here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

from tokenizers import Tokenizer

from lifecycle.data.spelled import SpelledTokens
from lifecycle.data.stream import StreamDecoder
from lifecycle.data.supervision import rendered_turns, supervised_tokens
from lifecycle.data.template import ChatTemplate, Message
from lifecycle.errors import CheckpointError, DataError
from lifecycle.json_file import read_object

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, CONFIG, TEMPLATE)
"""The files of a tokeniser, of which only the first must be there."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
"""The shortest conversation, to see what a template makes of it."""


class ChatTokenizer:
    """A tokeniser with its chat template and its end-of-sequence ids."""

    def __init__(
        self, tokenizer: Tokenizer, config: dict[str, Any], template: str | None, eos: set[int]
    ) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = _special_tokens(config)
        """The named special tokens: `bos_token`, `eos_token`, …"""
        self._template = None if template is None else ChatTemplate(template, self.special_tokens)
        self._configured_eos = eos
        self._spelled = SpelledTokens(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the tokeniser of a model folder.

        Raises:
            CheckpointError: there is none, or a file of it is damaged.
        """
        path = folder / TOKENIZER
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {TOKENIZER}; save the model with a fast tokeniser "
                "(tokenizer.save_pretrained of transformers writes the file)"
            )
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} is no tokeniser: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _settings(folder / CONFIG)
        eos = _eos_ids(folder)
        return cls(tokenizer, config, _chat_template(folder, config), eos)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included; a model may have more rows than that."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def tokenizer_json(self) -> str:
        """The tokeniser itself, as its `tokenizer.json` would have it."""
        return self._tokenizer.to_str()

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The tokeniser's own end-of-sequence token: what stands between documents."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The padding token."""
        return self._named_id("pad_token")

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """All tokens that end an answer: those of `generation_config.json`, `config.json` and
        the tokeniser, and the one with which the chat template ends an assistant's turn."""
        named = self.eos_token_id
        known = self._configured_eos | (set() if named is None else {named})
        try:
            ids, supervised = self._encode_supervised(PROBE, self._spelled.ids | known)
        except DataError:
            return frozenset(known)
        trained = [id for id, flag in zip(ids, supervised, strict=True) if flag]
        return frozenset({*known, trained[-1]})

    @property
    def chat_template(self) -> str | None:
        """The template's text, or None for a tokeniser without one."""
        return None if self._template is None else self._template.source

    @property
    def template_digest(self) -> str | None:
        """SHA-256 of the chat template; training and serving must agree on it."""
        return None if self._template is None else self._template.digest

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with what the tokeniser puts around it (such as `<s>`)."""
        # Unlike `encode`, a batch lets Python's other threads run meanwhile.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return batch[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that are no tokens give nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for the tokens of one answer as they come."""
        skip = self._spelled.ids if skip_special_tokens else frozenset[int]()
        return StreamDecoder(self._tokenizer, skip)

    def continuation(self, prompt: Sequence[int]) -> StreamDecoder:
        """A decoder for an answer that goes on with the text of a prompt: where there is such a
        text, the answer keeps the space that a text's first token loses."""
        context = self.encode("a", add_special_tokens=False) if self.decode(prompt[-8:]) else ()
        return StreamDecoder(self._tokenizer, self._spelled.ids, context)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The conversation as the template writes it; `variables` are further inputs of the
        template, such as `tools`.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        return self._chat.render(messages, add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The tokens of a conversation, by default ready for the assistant's next message.

        Special tokens come from the template only: in a message, `<|im_end|>` is text.

        Raises:
            DataError: as `render`.
        """
        mark = self._spelled.mark
        text = self.render(mark(messages), add_generation_prompt, **mark(variables))
        return self._spelled.encode(text).ids

    def encode_supervised(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The tokens of a whole conversation, and whether each is trained: what the assistant
        writes in its messages that are not `train: false`, each with its end-of-turn token.

        Raises:
            DataError: the template refuses the messages, renders them differently in training
                than in serving, or never ends a turn.
        """
        return self._encode_supervised(messages, self._spelled.ids | self.eos_token_ids)

    def _encode_supervised(
        self, messages: Sequence[Message], stops: frozenset[int]
    ) -> tuple[list[int], list[bool]]:
        text, turns = rendered_turns(self._chat, self._spelled.mark(messages))
        encoded = self._spelled.encode(text)
        return encoded.ids, supervised_tokens(encoded, turns, stops)

    @property
    def _chat(self) -> ChatTemplate:
        if self._template is None:
            raise DataError(
                "the tokeniser has no chat template; put a chat_template.jinja beside its "
                "tokenizer.json, or use plain text instead of messages"
            )
        return self._template

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


def _settings(path: Path) -> dict[str, Any]:
    """What a file says that need not be there."""
    return read_object(path) if path.is_file() else {}


def _token_text(value: Any) -> str | None:
    """A token in a configuration is a string, or an object with its `content`."""
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {name: _token_text(config.get(name)) for name in _NAMED}
    return {name: token for name, token in found.items() if token is not None}


def _eos_ids(folder: Path) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _settings(folder / name).get("eos_token_id")
        ids = cast("list[Any]", value if isinstance(value, list) else [value])
        if not all(id is None or type(id) is int for id in ids):
            raise CheckpointError(f"{folder / name} is damaged: eos_token_id is {value!r}")
        found.update(id for id in ids if id is not None)
    return found


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        for named in cast("list[Any]", template):
            match named:
                case {"name": "default", "template": str(text)}:
                    return text
                case _:
                    continue
        return None
    if not isinstance(template, str | None):
        raise CheckpointError(f"{folder / CONFIG} is damaged: its chat_template is no text")
    return template
