"""Conversations from a file: converted, checked row by row, every dropped row counted."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from lifecycle.data.formats import Detector, Message
from lifecycle.data.read import Row, check_json, read_rows
from lifecycle.errors import DataError
from lifecycle.pipeline.artifact import digest_of
from lifecycle.pipeline.suggest import did_you_mean

DUPLICATE, IN_TEST = "duplicate", "also in the test file"

# Who may speak after whom; None is the beginning.
_NEXT: Mapping[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_ROLES = [role for role in _NEXT if role]
_MOST_SHOWN = 5
_MOST_LINES = 10


@dataclass(slots=True)
class Dropped:
    """Rows that were left out for one reason."""

    count: int = 0
    lines: list[int] = field(default_factory=list[int])
    """The first of them: lines of jsonl and csv, rows of json and parquet."""

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.lines) else ""
        return f"{self.count:,} (at {', '.join(map(str, self.lines))}{more})"


@dataclass(slots=True)
class Loaded:
    """What a file gave."""

    conversations: dict[str, list[Message]] = field(default_factory=dict[str, list[Message]])
    """In the file's order, each once, by the digest of its messages."""
    read: int = 0
    format: str = ""
    dropped: dict[str, Dropped] = field(default_factory=dict[str, Dropped])
    bad: list[str] = field(default_factory=list[str])
    """The first rows that cannot be used, in words."""

    def summary(self) -> dict[str, Any]:
        """What was read and what was left out, as JSON."""
        dropped = {reason: asdict(entry) for reason, entry in sorted(self.dropped.items())}
        return {
            "format": self.format,
            "read": self.read,
            "kept": len(self.conversations),
            "dropped": dropped,
        }

    def drop(self, reason: str, row: Row) -> None:
        """Leave a row out and count it."""
        entry = self.dropped.setdefault(reason, Dropped())
        entry.count += 1
        if len(entry.lines) < _MOST_LINES:
            entry.lines.append(row.number)
        if reason not in (DUPLICATE, IN_TEST) and len(self.bad) < _MOST_SHOWN:
            self.bad.append(f"  {row.place}: {reason}")


def load_conversations(
    path: Path,
    *,
    format: str = "auto",
    system: str | None = None,
    max_rows: int | None = None,
    drop_bad_rows: bool = False,
    exclude: Container[str] = (),
) -> Loaded:
    """Read a file, up to `max_rows` different conversations. `system` opens those that have no
    system message; `exclude` are the questions (see `question_of`) of the test file.

    Raises:
        DataError: the file cannot be read, mixes formats, has no usable row, or has rows that
            cannot be used and `drop_bad_rows` is not set; names the first few.
    """
    loaded = Loaded()
    detector = Detector(format)
    for row in read_rows(path):
        if len(loaded.conversations) == max_rows:
            break
        loaded.read += 1
        try:
            messages = detector.format_of(row.values, f"{path}, {row.place}").convert(row.values)
            check_json(messages, "messages")
            if system and messages and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            check_conversation(messages)
        except ValueError as error:
            loaded.drop(str(error), row)
            if not drop_bad_rows and len(loaded.bad) == _MOST_SHOWN:
                break
            continue
        key = digest_of(messages)
        in_test = question_of(messages) in exclude
        if in_test or key in loaded.conversations:
            loaded.drop(IN_TEST if in_test else DUPLICATE, row)
        else:
            loaded.conversations[key] = messages
    loaded.format = detector.name or format
    _check(path, loaded, drop_bad_rows)
    return loaded


def _check(path: Path, loaded: Loaded, drop_bad_rows: bool) -> None:
    if loaded.bad and not drop_bad_rows:
        way_out = "correct them, or leave such rows out with 'on_bad_row: drop'"
        raise DataError("\n".join([f"{path} has unusable rows:", *loaded.bad, way_out]))
    if not loaded.conversations:
        dropped = [f"  {entry} dropped: {reason}" for reason, entry in loaded.dropped.items()]
        lines = [f"{path} has no usable row; the first of them:", *(loaded.bad or dropped)]
        raise DataError("\n".join(lines))


def question_of(messages: Sequence[Message]) -> str:
    """The digest of what is said before the assistant's first message. Conversations that have
    it in common belong in one split: another answer or a continuation gives the first away."""
    return digest_of(list(takewhile(lambda message: message["role"] != "assistant", messages)))


def check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Whether a model can learn from a conversation.

    Raises:
        ValueError: it cannot; says why.
    """
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message.get("content")
        if role not in _ROLES:
            shown = repr(role)[:40]
            raise ValueError(
                f"unknown role {shown}{did_you_mean(str(role), _ROLES)} "
                f"(known: {', '.join(_ROLES)})"
            )
        if role not in _NEXT[before]:
            after = f"after a message of the {before}" if before else "at the beginning"
            raise ValueError(f"message {number}: the {role} cannot speak {after}")
        calls = role == "assistant" and message.get("tool_calls")
        _check_content(number, content, optional=bool(calls))
        before = role
    if not any(m["role"] == "assistant" and m.get("train") is not False for m in messages):
        raise ValueError("there is no message of the assistant to train on")
    if before != "assistant":
        raise ValueError(f"the last message is the {before}'s, so nothing answers it")


def _check_content(number: int, content: Any, optional: bool) -> None:
    if optional and not content:
        return
    if not isinstance(content, str):
        raise ValueError(f"message {number}: the content is no text")
    if not content.strip():
        raise ValueError(f"message {number}: the content is empty")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"message {number}: the content has half of a surrogate pair")


def write_conversations(
    folder: Path,
    train: Iterable[Sequence[Message]],
    test: Iterable[Sequence[Message]],
    report: Mapping[str, Any],
) -> None:
    """Write the files of the kind `Conversations`."""
    for split, conversations in (("train", train), ("test", test)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for messages in conversations:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
