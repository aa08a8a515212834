"""Which part of a rendered conversation the model is trained to write."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lifecycle.data.template import ChatTemplate, Message
from lifecycle.errors import DataError


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant message in the rendered text, in characters."""

    start: int
    """Where a generation prompt would end: what the model sees when it is served."""
    content_end: int
    """Behind the message's content; the end-of-turn token is the first at or after it."""
    train: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens, with the characters [first, behind) that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def rendered_turns(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[Turn]]:
    """The conversation as text, and the assistant turns in it.

    Raises:
        DataError: the template refuses the messages, leaves something of a turn out, or does not
            render what comes before it the way it does when that turn is to be generated.
    """
    _require_tool_calls(template, messages)
    if not template.has_generation_blocks:
        text = template.render(messages)
        return text, list(_located(template, messages, text))
    text, spans = template.render_generations(messages)
    train = [m.get("train") is not False for m in messages if m["role"] == "assistant"]
    if len(spans) != len(train):
        raise DataError(
            f"the chat template has {len(spans)} generation blocks for {len(train)} "
            "assistant messages; it must write one around each"
        )
    return text, [Turn(*span, flag) for span, flag in zip(spans, train, strict=True)]


def _require_tool_calls(template: ChatTemplate, messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if not message.get("tool_calls"):
            continue
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        before = messages[:index]
        if template.render([*before, message]) == template.render([*before, without]):
            raise DataError(
                f"the chat template leaves out the tool_calls of message {index + 1}, so they "
                "cannot be trained on; use a template that writes them, or take them out"
            )


def _located(template: ChatTemplate, messages: Sequence[Message], text: str) -> Iterator[Turn]:
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:index], add_generation_prompt=True)
        if not text.startswith(before):
            raise DataError(
                f"the chat template renders the {index} messages before an assistant message "
                "differently once that message follows, so the model would be trained on "
                "another text than it is served; use a template with {% generation %} blocks"
            )
        limit = _common_length(text, template.render(messages[: index + 1]))
        end = _content_end(text, len(before), limit, message)
        yield Turn(len(before), end, message.get("train") is not False)


def _common_length(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    differing = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(differing, min(len(one), len(other)))


def _content_end(text: str, start: int, limit: int, message: Message) -> int:
    """Where the content that begins at or behind `start` ends, up to `limit` if it is there.

    Templates trim the content, and some drop the reasoning before the answer, so it is the last
    line that is looked for. A template that renders the last turn of a conversation in another
    way than the earlier ones has a `limit` before the content.
    """
    content = message.get("content")
    lines = content.strip().splitlines() if isinstance(content, str) else []
    if not lines:
        return start
    last = lines[-1]
    found = text.rfind(last, start, limit)
    if found < 0:
        found = text.find(last, start)
    if found < 0:
        raise DataError(
            f"the chat template leaves out the assistant's text {last[:60]!r}, "
            "so it cannot be trained on"
        )
    return found + len(last)


def supervised_tokens(encoded: Encoded, turns: Sequence[Turn], stops: frozenset[int]) -> list[bool]:
    """Whether each token is trained: those of the turns to train, each up to and with the
    first of `stops` behind its content.

    Raises:
        DataError: a turn has no such token; the model would never learn to stop.
    """
    supervised = [False] * len(encoded.ids)
    ends = [behind for _, behind in encoded.offsets]
    limits = [*(turn.start for turn in turns[1:]), len(ends) and ends[-1]]
    for turn, limit in zip(turns, limits, strict=True):
        if not turn.train:
            continue
        first = bisect_right(ends, turn.start)
        candidates = range(bisect_left(ends, turn.content_end), bisect_right(ends, limit))
        last = next((i for i in candidates if encoded.ids[i] in stops), None)
        if last is None:
            raise DataError(
                "the chat template ends an assistant message without a special token of this "
                "tokeniser, so the model would never learn to stop; use a template that writes "
                "the end-of-sequence token"
            )
        supervised[first : last + 1] = [True] * (last + 1 - first)
    return supervised
