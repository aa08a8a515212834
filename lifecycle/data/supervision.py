"""Which part of a rendered conversation the model is trained to write."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lifecycle.data.template import ChatTemplate, Message
from lifecycle.errors import DataError


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant message in the rendered text, in characters."""

    start: int
    """Where a generation prompt would end: what the model sees when it is served."""
    content_end: int
    """Behind what the message says; the end-of-turn token is the first that ends there or
    later."""
    limit: int
    """Where the next message begins, if that can be told, and else where the text ends."""
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
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if template.has_generation_blocks:
        text, spans = template.render_generations(messages)
    else:
        text, spans = template.render(messages), [None] * len(answers)
    if len(spans) != len(answers):
        raise DataError(
            f"the chat template has {len(spans)} generation blocks for {len(answers)} "
            "assistant messages; it must write one around each"
        )
    pairs = zip(answers, spans, strict=True)
    return text, [_turn(template, messages[: i + 1], text, span) for i, span in pairs]


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


def _turn(
    template: ChatTemplate, messages: Sequence[Message], text: str, span: tuple[int, int] | None
) -> Turn:
    """The turn of the last of `messages`, with which the conversation may go on."""
    so_far = template.render(messages)
    start, end = span or _located(template, messages, text, so_far)
    # Templates may write a line end behind the end-of-turn token.
    end = start + len(text[start:end].rstrip())
    limit = len(so_far) if text.startswith(so_far) else len(text)
    return Turn(start, end, limit, messages[-1].get("train") is not False)


def _located(
    template: ChatTemplate, messages: Sequence[Message], text: str, so_far: str
) -> tuple[int, int]:
    """Where the last of `messages` begins, and the end of its content or of its tool calls."""
    before = template.render(messages[:-1], add_generation_prompt=True)
    if not text.startswith(before):
        raise DataError(
            f"the chat template renders the {len(messages) - 1} messages before an assistant "
            "message differently once that message follows, so the model would be trained on "
            "another text than it is served; use a template with {% generation %} blocks"
        )
    limit = _common_length(text, so_far)
    end = _content_end(text, len(before), limit, messages[-1])
    # Behind the content come the tool calls, which special tokens may open and divide.
    return len(before), max(end, limit) if messages[-1].get("tool_calls") else end


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
        DataError: a turn has no such token, so the model would never learn to stop; or it has
            nothing else.
    """
    supervised = [False] * len(encoded.ids)
    ends = [behind for _, behind in encoded.offsets]
    next_starts = [*(turn.start for turn in turns[1:]), len(ends) and ends[-1]]
    for turn, next_start in zip(turns, next_starts, strict=True):
        if not turn.train:
            continue
        first = bisect_right(ends, turn.start)
        behind = bisect_right(ends, min(turn.limit, next_start))
        candidates = range(max(first, bisect_left(ends, turn.content_end)), behind)
        last = next((i for i in candidates if encoded.ids[i] in stops), None)
        if last is None:
            raise DataError(
                "the chat template ends an assistant message without a special token of this "
                "tokeniser, so the model would never learn to stop; use a template that writes "
                "the end-of-sequence token"
            )
        if last == first:
            raise DataError(
                "the chat template writes nothing of an assistant message but its end, so there "
                "is nothing to train; use a template that writes all of it"
            )
        supervised[first : last + 1] = [True] * (last + 1 - first)
    return supervised
