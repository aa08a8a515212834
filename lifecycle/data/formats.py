"""The shapes in which conversations come; each becomes a list of messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from lifecycle.errors import DataError
from lifecycle.pipeline import registry

AUTO = "auto"
"""The name that stands for whichever format fits."""

Message = dict[str, Any]
Row = Mapping[str, Any]

_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


class Format(ABC):
    """One shape of a row. Plug-ins of the group `lifecycle.formats` are subclasses."""

    keys: ClassVar[str]
    """The keys of its rows, in words for messages."""

    @abstractmethod
    def matches(self, row: Row) -> bool:
        """Whether the keys of a row are those of this format; a row may have others besides."""

    @abstractmethod
    def convert(self, row: Row) -> list[Message]:
        """The messages of a row that matches.

        Raises:
            ValueError: a value is not what the format has there; says which and why.
        """


class Messages(Format):
    """OpenAI's: a list of `role` and `content`. A `weight` of 0 is read as `train: false`."""

    keys = "messages"

    def matches(self, row: Row) -> bool:
        return "messages" in row

    def convert(self, row: Row) -> list[Message]:
        _refuse_tools(row)
        return [_message(item) for item in _items(row, "messages")]


class ShareGpt(Format):
    """A list of `from` (human, gpt, system, tool) and `value`, with an optional `system`. A
    `weight` is read as in OpenAI's format."""

    keys = "conversations"
    roles: ClassVar[Mapping[str, str]] = {
        "human": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "observation": "tool",
    }

    def matches(self, row: Row) -> bool:
        return "conversations" in row

    def convert(self, row: Row) -> list[Message]:
        _refuse_tools(row)
        messages = _system(row)
        for item in _items(row, "conversations"):
            if "from" not in item or "value" not in item:
                raise ValueError(f"a turn needs 'from' and 'value', not {_names(item)}")
            _refuse_others(item, ("from", "value"))
            role = str(item["from"])
            message = {"role": self.roles.get(role, role), "content": item["value"]}
            messages.append(message | _trained(item))
        return messages


class Alpaca(Format):
    """`instruction`, an optional `input` below it, `output`, and an optional `system`."""

    keys = "instruction, output"

    def matches(self, row: Row) -> bool:
        return "instruction" in row and "output" in row

    def convert(self, row: Row) -> list[Message]:
        parts = [_string(row, "instruction")]
        if row.get("input") is not None:
            parts.append(_string(row, "input"))
        question = "\n\n".join(part for part in parts if part)
        return [*_system(row), *_exchange(question, _string(row, "output"))]


class PromptCompletion(Format):
    """One question and its answer: `prompt` and `completion`, `prompt` and `response`, or
    `question` and `answer`."""

    keys = "prompt, completion"
    pairs: ClassVar = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))

    def matches(self, row: Row) -> bool:
        return any(prompt in row and answer in row for prompt, answer in self.pairs)

    def convert(self, row: Row) -> list[Message]:
        found = [pair for pair in self.pairs if pair[0] in row and pair[1] in row]
        if len(found) > 1:
            raise ValueError(f"both '{found[0][1]}' and '{found[1][1]}' could be the answer")
        prompt, answer = found[0]
        return [*_system(row), *_exchange(_string(row, prompt), _string(row, answer))]


def load_format(name: str) -> Format:
    """The format of a name.

    Raises:
        PluginError: there is none; lists those that there are.
    """
    found = cast("Callable[[], Format]", registry.load(registry.FORMATS, name, Format))
    return found()


class Detector:
    """Finds the one format that all rows of a file have, among all or of a given name."""

    def __init__(self, name: str = AUTO) -> None:
        names = registry.names(registry.FORMATS) if name == AUTO else [name]
        self._formats = {name: load_format(name) for name in names}
        self._first: tuple[str, str] | None = None

    @property
    def name(self) -> str | None:
        """The format that was found; None before the first row that has one."""
        return self._first[0] if self._first else None

    def format_of(self, row: Row, place: str) -> Format:
        """The format of a row, which must be that of all rows before it.

        Raises:
            ValueError: the row has none.
            DataError: it has several, or another than those before.
        """
        matching = [name for name, format in self._formats.items() if format.matches(row)]
        if not matching:
            known = "; ".join(f"{name}: {format.keys}" for name, format in self._formats.items())
            raise ValueError(f"{_names(row)} fit no format ({known})")
        if len(matching) > 1:
            raise DataError(
                f"{place}: {_names(row)} fit {' and '.join(matching)}; "
                "name the one you mean with 'format'"
            )
        found, first = self._first or (matching[0], place)
        if found != matching[0]:
            raise DataError(
                f"two formats are mixed: {first} is {found}, {place} is {matching[0]}; "
                "use one file for each"
            )
        self._first = (found, first)
        return self._formats[found]


def _message(item: Row) -> Message:
    calls = item.get("tool_calls")
    if item.get("role") is None or ("content" not in item and not calls):
        raise ValueError(f"a message needs 'role' and 'content', not {_names(item)}")
    _refuse_others(item, _MESSAGE_KEYS)
    message = {key: item[key] for key in _MESSAGE_KEYS if item.get(key) is not None}
    if calls:
        # Templates read the content even where OpenAI leaves it out.
        message.setdefault("content", "")
    return message | _trained(item)


def _trained(item: Row) -> dict[str, bool]:
    """`train`, if a message says it, or says it with OpenAI's `weight`."""
    train, weight = item.get("train"), item.get("weight")
    if not isinstance(train, bool | None):
        raise ValueError(f"'train' must be true or false, not {train!r}")
    if weight not in (None, 0, 1):
        raise ValueError(f"'weight' must be 0 or 1, not {weight!r}")
    if weight == 0:
        train = False
    return {} if train is None else {"train": train}


def _refuse_others(item: Row, known: Sequence[str]) -> None:
    """What would be left out of the training without a word."""
    for key, value in item.items():
        if key not in (*known, "train", "weight") and value not in (None, "", [], {}):
            raise ValueError(
                f"a message has '{key}', which would not be trained; take it out, or make it a "
                "part of the text"
            )


def _refuse_tools(row: Row) -> None:
    if row.get("tools"):
        raise ValueError(
            "'tools' would not be shown to the model; take them out, or describe them in a "
            "system message"
        )


def _items(row: Row, key: str) -> list[Row]:
    value = row[key]
    if not isinstance(value, list):
        raise ValueError(f"'{key}' must be a list, not {type(value).__name__}")
    for item in cast("list[Any]", value):
        if not isinstance(item, Mapping):
            raise ValueError(f"'{key}' must be a list of objects, not of {type(item).__name__}")
    return cast("list[Row]", value)


def _string(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be text, not {type(value).__name__}")
    return value


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": _string(row, "system")}] if row.get("system") else []


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _names(row: Row) -> str:
    return "the keys " + (", ".join(f"'{key}'" for key in row) or "(none)")
