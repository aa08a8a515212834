"""What a model is measured on: rows of a split as tokens to score and questions to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lifecycle.data.chat import ChatTokenizer
from lifecycle.errors import DataError, StageError
from lifecycle.kinds import Conversations, Split, Text
from lifecycle.pipeline.artifact import digest_of

Row = dict[str, Any]

_ANSWER_MARGIN = 8
"""New tokens beyond the expected answer: an answer that is still going on then is wrong, and
its beginning says how."""

OTHER_TOKENS = (
    "the model and its reference turn the same text into different tokens, so that perplexity "
    "and agreement do not compare; use 'metrics: [accuracy]', or a reference with the same "
    "tokeniser and chat template"
)


class Sized(Protocol):
    """Something that takes a number of tokens of context."""

    @property
    def length(self) -> int: ...


S = TypeVar("S", bound=Sized)


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens to score: of `token_ids`, those at the positions `targets` (never 0) count."""

    token_ids: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of context that scoring it takes."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation up to its last assistant message, and that message."""

    text: str
    """The message that is to be answered."""
    prompt: tuple[int, ...]
    expected: str
    """What training teaches the model to write, up to the end of the turn: the message with what
    the template puts around it, such as empty reasoning or a tool call's markup."""
    max_new_tokens: int

    @property
    def length(self) -> int:
        """Tokens of context that answering it takes."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Selection(Generic[S]):
    """The chosen items, each as every model sees it, and how many rows did not fit."""

    items: list[tuple[S, ...]]
    too_long: int


def ranked_rows(data: Conversations | Text, split: Split, name: str) -> list[Row]:
    """The rows of a split in an order that depends on nothing but their contents, so that the
    first n are the same sample of it whatever order the rows come in.

    Raises:
        DataError: the split is empty; `name` is what the recipe calls the data.
    """
    rows = sorted(data.rows(split), key=digest_of)
    if not rows:
        raise DataError(
            f"'{name}' has no {split} rows to evaluate on: give it a holdout, "
            f"or evaluate on the {'train' if split == 'test' else 'test'} split"
        )
    return rows


def windows(tokenizer: ChatTokenizer, row: Row, length: int) -> list[Sample]:
    """A document in consecutive windows of at most `length` tokens; each is scored by itself,
    all its tokens but the first."""
    ids = tokenizer.encode(row["text"])
    parts = [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]
    return [Sample(part, tuple(range(1, len(part)))) for part in parts if len(part) > 1]


def supervised(tokenizer: ChatTokenizer, row: Row) -> list[Sample]:
    """A conversation, scored where it is trained; nothing if it is trained nowhere."""
    ids, flags = tokenizer.encode_supervised(row["messages"])
    targets = tuple(t for t, flag in enumerate(flags) if flag and t > 0)
    return [Sample(tuple(ids), targets)] if targets else []


def question(tokenizer: ChatTokenizer, row: Row) -> list[Question]:
    """A conversation as a question; nothing if the assistant says nothing after the start.

    Raises:
        DataError: the answer cannot be told from the prompt, as `encode_supervised`.
    """
    messages: list[Row] = row["messages"]
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    if last == 0:
        return []
    prompt = tokenizer.encode_chat(messages[:last], add_generation_prompt=True)
    answer = _answer(tokenizer, messages[: last + 1], prompt)
    asked = messages[last - 1].get("content") or ""
    budget = len(answer) + _ANSWER_MARGIN
    return [Question(asked, tuple(prompt), tokenizer.decode(answer), budget)]


def _answer(tokenizer: ChatTokenizer, messages: Sequence[Row], prompt: list[int]) -> list[int]:
    """The trained tokens of the last message behind the prompt, without the one that ends it."""
    last = len(messages) - 1
    only_last = [{**message, "train": i == last} for i, message in enumerate(messages)]
    ids, flags = tokenizer.encode_supervised(only_last)
    pairs = enumerate(zip(prompt, ids, strict=False))
    # Where the answer's first token takes in the prompt's last one, it still is the answer's.
    behind = next((i for i, (one, other) in pairs if one != other), len(prompt))
    return [id for i, id in enumerate(ids) if flags[i] and i >= behind][:-1]


def select(
    rows: Sequence[Row],
    tokenizers: Sequence[ChatTokenizer],
    build: Callable[[ChatTokenizer, Row], Sequence[S]],
    context: int,
    limit: int | None,
) -> Selection[S]:
    """The first `limit` items that `build` makes of `rows` and that fit into `context` tokens
    of every model; each item once per tokeniser.

    Raises:
        DataError: there is nothing to measure, or nothing that fits.
        StageError: the models make different items of a row.
    """
    items: list[tuple[S, ...]] = []
    too_long = 0
    for item in _items(rows, tokenizers, build):
        if limit is not None and len(items) == limit:
            break
        if max(one.length for one in item) > context:
            too_long += 1
        else:
            items.append(item)
    if not items and too_long:
        raise DataError(
            f"none of the {too_long} rows fits into {context} tokens, which is the least of "
            "'max_length' and what the models can read at once"
        )
    if not items:
        raise DataError("no row has a supervised token: nothing can be measured")
    return Selection(items, too_long)


def _items(
    rows: Sequence[Row],
    tokenizers: Sequence[ChatTokenizer],
    build: Callable[[ChatTokenizer, Row], Sequence[S]],
) -> Iterator[tuple[S, ...]]:
    for row in rows:
        built = [build(tokenizer, row) for tokenizer in tokenizers]
        if len({len(items) for items in built}) > 1:
            raise StageError(OTHER_TOKENS)
        yield from zip(*built, strict=True)
