"""What is measured on: the choice of rows, where they count, and what is left out."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.data.chat import ChatTokenizer
from lifecycle.errors import DataError, StageError
from lifecycle.evaluation.samples import (
    Sample,
    question,
    ranked_rows,
    select,
    supervised,
    windows,
)
from tests import tiny
from tests.tiny import ANSWERS, ROWS, conversation


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return ChatTokenizer.load(folder)


def test_the_choice_of_rows_does_not_depend_on_their_order(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    one = tiny.conversations(tmp_path / "one", ROWS)
    two = tiny.conversations(tmp_path / "two", shuffled)
    assert ranked_rows(one, "test", "chat") == ranked_rows(two, "test", "chat")
    assert ranked_rows(one, "test", "chat") != ROWS


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    data = tiny.conversations(tmp_path / "data")
    with pytest.raises(DataError, match="'chat' has no train rows"):
        ranked_rows(data, "train", "chat")


def test_the_answer_and_its_end_count(tokenizer: ChatTokenizer) -> None:
    (sample,) = supervised(tokenizer, conversation("a", "one"))
    counted = [sample.token_ids[t] for t in sample.targets]
    assert tokenizer.decode(counted, skip_special_tokens=False) == "one<|end|>"


def test_a_conversation_that_is_not_trained_does_not_count(tokenizer: ChatTokenizer) -> None:
    row = conversation("a", "one")
    row["messages"][1]["train"] = False
    assert supervised(tokenizer, row) == []


def test_the_last_assistant_message_is_the_question(tokenizer: ChatTokenizer) -> None:
    turns = [*conversation("a", "one")["messages"], *conversation("b", "two")["messages"]]
    row = {"messages": [*turns, {"role": "user", "content": "bye"}]}
    (asked,) = question(tokenizer, row)
    assert (asked.text, asked.expected) == ("b", "two")
    prompt = tokenizer.decode(asked.prompt, skip_special_tokens=False)
    assert prompt == "<|user|>a<|end|><|assistant|>one<|end|><|user|>b<|end|><|assistant|>"
    assert asked.max_new_tokens > len("two")


# As Qwen3 does: the last answer opens with reasoning that no generation prompt holds.
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}hm.{% endif %}"
    "{{ m.content }}{{ m.tool_calls }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("train", [True, False])
def test_what_is_expected_is_what_is_trained(tmp_path: Path, train: bool) -> None:
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(REASONING)
    tokenizer = ChatTokenizer.load(tmp_path)
    messages = [*conversation("a", "one")["messages"], *conversation("b", "two")["messages"]]
    messages[-1]["train"] = train
    (asked,) = question(tokenizer, {"messages": messages})
    assert asked.expected == "hm.two"
    assert asked.max_new_tokens == len("hm.two") + 8
    called = [*messages[:3], {"role": "assistant", "content": "", "tool_calls": "call"}]
    (asked,) = question(tokenizer, {"messages": called})
    assert asked.expected == "hm.call"


def test_a_question_without_content_has_no_text(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "tool"}, {"role": "assistant", "content": "one"}]
    (asked,) = question(tokenizer, {"messages": messages})
    assert asked.text == ""


@given(st.text("abc", min_size=0, max_size=50), st.integers(2, 20))
def test_windows_cover_a_text_once(tokenizer: ChatTokenizer, text: str, length: int) -> None:
    parts = windows(tokenizer, {"text": text}, length)
    ids = tokenizer.encode(text)
    covered = [id for part in parts for id in part.token_ids]
    assert covered == ids[: len(covered)]
    assert len(ids) - len(covered) < 2
    assert all(len(part.token_ids) <= length for part in parts)
    assert all(part.targets == tuple(range(1, len(part.token_ids))) for part in parts)


def test_no_more_than_the_limit_is_chosen(tokenizer: ChatTokenizer) -> None:
    few = select(ROWS, [tokenizer], supervised, context=64, limit=3)
    every = select(ROWS, [tokenizer], supervised, context=64, limit=None)
    assert few.items == every.items[:3]
    assert len(every.items) == len(ANSWERS)


def test_what_does_not_fit_is_counted(tokenizer: ChatTokenizer) -> None:
    rows = [conversation("a" * 90, "one"), *ROWS]
    chosen = select(rows, [tokenizer], supervised, context=64, limit=None)
    assert (len(chosen.items), chosen.too_long) == (len(ROWS), 1)


def test_nothing_that_fits_is_an_error(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="none of the 7 rows fits into 4 tokens"):
        select(ROWS, [tokenizer], supervised, context=4, limit=None)


def test_nothing_supervised_is_an_error(tokenizer: ChatTokenizer) -> None:
    row = conversation("a", "one")
    row["messages"][1]["train"] = False
    with pytest.raises(DataError, match="no row has a supervised token"):
        select([row], [tokenizer], supervised, context=64, limit=None)


def test_models_that_cut_a_text_differently_do_not_compare(
    tokenizer: ChatTokenizer, data_dir: Path
) -> None:
    other = ChatTokenizer.load(data_dir / "stories260K" / "hf")
    rows = [{"text": "one upon a time " * 20}]
    with pytest.raises(StageError, match="the same text into different tokens"):
        select(rows, [tokenizer, other], partial(windows, length=16), context=64, limit=None)


def test_a_sample_takes_its_tokens() -> None:
    assert Sample((1, 2, 3), (1, 2)).length == 3
