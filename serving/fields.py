"""Types of the fields of request bodies, and what is checked of each by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

MAX_ITEMS = 2048
"""Messages of a chat, prompts of a completion. A wrong item costs an error of over 1 kB, so that
a body of 4 MB with a million of them would take gigabytes."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024


def only(*neutral: object) -> AfterValidator:
    """A field of the API that this server does not have: only values that ask for nothing."""

    def check(value: object) -> object:
        if value not in neutral:
            raise PydanticCustomError(
                "unsupported", "this server does not support it; leave it out"
            )
        return value

    return AfterValidator(check)


def printable(name: str) -> str:
    """The beginning of a name that a client chose, as an error may show it."""
    return name[:64].encode(errors="backslashreplace").decode()


def _is_text(value: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and cannot be tokenised."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "text", "is no Unicode text: it holds a lone surrogate"
        ) from error
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _content(value: object) -> object:
    """A message's content as one string; parts of text are joined by line breaks."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in cast("list[object]", value):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise PydanticCustomError("content", "only parts of type 'text' are supported")
    return "\n".join(texts)


def _prompts(value: object) -> list[str] | list[list[int]]:
    """A prompt in any of its four forms as a list of strings or of lists of token ids."""
    match value:
        case str():
            return [_is_text(value)]
        case [*items] if items and all(type(item) is int for item in items):
            return [cast("list[int]", items)]
        case [*items] if len(items) > MAX_ITEMS:
            raise PydanticCustomError("prompt", "has more than {most} prompts", {"most": MAX_ITEMS})
        case [*items] if items and all(isinstance(item, str) for item in items):
            return [_is_text(item) for item in cast("list[str]", items)]
        case [*items] if items and all(_is_tokens(item) for item in items):
            return cast("list[list[int]]", items)
        case _:
            raise PydanticCustomError(
                "prompt",
                "must be a string, a list of strings, a list of token ids or a list of such lists",
            )


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int for item in cast("list[object]", value)
    )


def _by_token(value: object) -> object:
    """JSON has no keys but strings."""
    if not isinstance(value, Mapping):
        return value
    pairs = cast("Mapping[str, object]", value)
    if len(pairs) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", "has more than {most}", {"most": MAX_BIASES})
    found: dict[int, object] = {}
    for key, bias in pairs.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 20) or str(int(key)) != key:
            shown = {"key": printable(key)}
            raise PydanticCustomError("logit_bias", "'{key}' is no token id", shown)
        found[int(key)] = bias
    return found


def _schema(value: object) -> object:
    """What is in a schema is seen to where it is compiled."""
    if isinstance(value, str):
        return _is_text(value)
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("json_schema", "must be a JSON schema: an object")
    return cast("object", value)


Text = Annotated[str, AfterValidator(_is_text)]
Content = Annotated[Text, BeforeValidator(_content)]
Prompts = Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS)]
Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_list),
]
Biases = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_token)]
Schema = Annotated[Any, AfterValidator(_schema)]
