"""Stop strings and characters, wherever the borders of tokens are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.data.chat import ChatTokenizer
from serving.text import AnswerText, StopMatcher, TokenTexts

# Few letters, so that stop strings overlap each other and themselves.
LETTERS = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, spelled out: read character by character until a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def cut_at(text: str, places: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(borders)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 24), max_size=12))
def test_the_pieces_do_not_matter(text: str, stops: list[str], places: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown = [matcher.push(piece) for piece in cut_at(text, places)]
    assert ("".join(shown) + matcher.finish(), matcher.stopped) == reference(text, stops)


@given(LETTERS, STOPS)
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(letter) for letter in text)
    if not matcher.stopped:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_no_stop_strings_hold_nothing_back() -> None:
    matcher = StopMatcher([])
    assert [matcher.push(piece) for piece in ("a", "b")] == ["a", "b"]


def test_a_text_has_ended_after_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("text EN") == "text "
    assert matcher.push("D more") == ""
    assert matcher.push("and more") + matcher.finish() == ""


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_tokens_give_the_text_that_decoding_gives(
    tokenizer: ChatTokenizer, text: str, stops: list[str]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    answer = AnswerText(tokenizer.stream(), stops)
    shown = "".join(answer.push(id) for id in ids) + answer.finish()
    assert (shown, answer.stopped) == reference(tokenizer.decode(ids), stops)


def test_half_a_character_is_never_shown(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) > 1
    answer = AnswerText(tokenizer.stream(), [])
    assert [answer.push(id) for id in ids[:-1]] == [""] * (len(ids) - 1)
    assert answer.push(ids[-1]) == "😀"


def test_a_token_keeps_its_space(stories_bundle: Path) -> None:
    tokenizer = ChatTokenizer.load(stories_bundle)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("there was a girl", add_special_tokens=False)
    assert "".join(map(texts, ids)).strip() == "there was a girl"


@pytest.fixture(scope="session")
def tokenizer(chat_bundle: Path) -> ChatTokenizer:
    return ChatTokenizer.load(chat_bundle)
