"""What an answer must be, and the grammar that llguidance reads for it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

from lifecycle.engines.grammar.exact import exact
from lifecycle.engines.grammar.schema import check_schema
from lifecycle.errors import RequestError

Kind = Literal["json_object", "json_schema", "regex", "lark", "choice"]

MAX_TEXT = 128 * 1024
"""Characters of a grammar."""
MAX_CHOICES = 4096

_JSON_OPTIONS: Any = {
    # A space or none behind a comma and a colon, and no other: where any is allowed, small models write
    # line breaks until the answer is full.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
}
_EMBEDDED = re.compile(r"%(json|llguidance)\s*\{")


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must be."""

    kind: Kind
    value: str | tuple[str, ...] = ""
    """The text of a JSON schema, a regular expression or a grammar in llguidance's form of Lark; the
    choices of `choice`; nothing for `json_object`."""

    @classmethod
    def of_schema(cls, schema: object) -> Self:
        """Of a JSON schema, parsed or as text. The order of its properties is that of the answer.

        Raises:
            RequestError: it is nested too deeply or too long.
        """
        if isinstance(schema, str):
            return cls("json_schema", schema)
        try:
            # Without spaces, so that it is known whatever the client's spaces were.
            text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except RecursionError:
            raise RequestError(
                "the JSON schema is nested too deeply; name its parts in $defs and refer to them"
            ) from None
        except ValueError as error:
            raise RequestError(f"the JSON schema is no JSON: {error}") from None
        return cls("json_schema", text)

    @property
    def length(self) -> int:
        """Characters of its text."""
        return sum(map(len, self.value))

    def to_llguidance(self) -> str:
        """The grammar as llguidance reads it; not yet compiled.

        Raises:
            RequestError: it is too long, no text, or no schema that can be followed.
        """
        if self.length > MAX_TEXT:
            raise RequestError(
                f"the grammar has {self.length} characters; at most {MAX_TEXT} are taken: leave out "
                "descriptions, or ask for less at once"
            )
        try:
            return self._for_llguidance()
        except ValueError as error:
            # What Python reads and the library does not: NaN, 1e999, half a surrogate pair.
            raise RequestError(f"the grammar cannot be read: {error}") from None

    def _for_llguidance(self) -> str:
        from llguidance import LLMatcher

        match self.kind, self.value:
            case "json_object", _:
                schema = {"type": "object"}
                return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
            case "json_schema", str(text):
                schema = _parsed(text)
                check_schema(schema)
                # As it came, where nothing is to be said: numbers are spelled in many ways.
                narrow = exact(schema)
                given = "{}" if schema is True else text if narrow == schema else json.dumps(narrow)
                return LLMatcher.grammar_from_json_schema(given, overrides=_JSON_OPTIONS)
            case "regex", str(text):
                return LLMatcher.grammar_from_regex(text)
            case "lark", str(text):
                return LLMatcher.grammar_from_lark(_checked_lark(text))
            case "choice", tuple(choices):
                return LLMatcher.grammar_from_lark(_alternatives(choices))
            case _:
                raise RequestError(f"a grammar of kind '{self.kind}' cannot be {self.value!r}")


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON: {error}") from None


def _checked_lark(text: str) -> str:
    if _EMBEDDED.search(text):
        raise RequestError(
            "grammars with %json or %llguidance inside are not supported; ask for a JSON schema by itself"
        )
    if "::=" in text and "start" not in text:
        raise RequestError(
            "the grammar is no Lark grammar: rules are written 'name: …', the first is 'start'; "
            "GBNF and EBNF with '::=' are not supported"
        )
    return text


def _alternatives(choices: tuple[str, ...]) -> str:
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise RequestError(
            f"there are {len(choices)} choices; between 1 and {MAX_CHOICES} are taken"
        )
    # Strings of Lark are escaped as in JSON. As one terminal they are followed by the lexer: the parser has room
    # for some hundred alternatives.
    texts = [json.dumps(choice) for choice in dict.fromkeys(choices) if choice]
    rules = ["CHOICE"] * bool(texts) + ['""'] * ("" in choices)
    return f"start: {' | '.join(rules)}\n" + f"CHOICE: {' | '.join(texts)}\n" * bool(texts)
