"""Chat templates: Jinja, rendered in a sandbox just as `transformers` renders them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lifecycle.errors import DataError

Message = Mapping[str, Any]
"""`role`, `content` and whatever else the template reads."""

MAX_TEMPLATE = 256 * 1024
"""Longest template, in characters; the longest of well-known models has 17,000."""
MAX_OUTPUT = 16 * 1024 * 1024
"""Longest rendered conversation, in characters."""

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARK = "mark_generation"

# What a template can raise by itself: its own errors, and those of the expressions in it.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: encloses what the model writes.

    The text passes unchanged, or between marks when the context asks for them.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_pass", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _pass(self, context: Context, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if context.get(_MARK) else text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One template with the special tokens of its tokeniser."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    @property
    def digest(self) -> str:
        """SHA-256 of the template's text, in hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if len(self.source) > MAX_TEMPLATE:
            raise DataError(
                f"the chat template has {len(self.source):,} characters; "
                f"more than {MAX_TEMPLATE:,} are refused"
            )
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"line {error.lineno} of the chat template: {error.message}") from error

    @property
    def has_generation_blocks(self) -> bool:
        """Whether the template says itself which text the model writes."""
        return "endgeneration" in self.source

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The conversation as one string, special tokens included.

        `variables` reach the template (`tools`, `enable_thinking`, …) but replace neither the
        special tokens nor the messages.

        Raises:
            DataError: the template refuses the messages, fails, or writes too much.
        """
        values: dict[str, Any] = {"tools": None, "documents": None, **variables}
        values |= self._special_tokens
        values["messages"] = [
            {key: value for key, value in message.items() if key != "train"} for message in messages
        ]
        values["add_generation_prompt"] = add_generation_prompt
        parts: list[str] = []
        size = 0
        try:
            for part in self._compiled.generate(values):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT:
                    raise DataError(f"the chat template wrote more than {MAX_OUTPUT:,} characters")
        except _FAILURES as error:
            raise DataError(f"the chat template refused the messages: {error}") from error
        return "".join(parts)

    def render_generations(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation, and the character span of every `{% generation %}` block in it.

        Raises:
            DataError: as `render`, or the blocks are nested.
        """
        text, spans = "", list[tuple[int, int]]()
        head, *blocks = self.render(messages, **{_MARK: True}).split(_OPEN)
        text += head
        for block in blocks:
            inside, closed, after = block.partition(_CLOSE)
            if not closed or _CLOSE in after:
                raise DataError("the {% generation %} blocks of the chat template are nested")
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return text, spans
