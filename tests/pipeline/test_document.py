from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle.errors import RecipeError
from lifecycle.pipeline.document import parse, read, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        (".5", 0.5),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("null", None),
        ("'1'", "1"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        (".inf", math.inf),
        ("<= 1.02", "<= 1.02"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"key: {text}", "f").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_lines_are_known_for_every_value() -> None:
    doc = parse("a: 1\nb:\n  c:\n    - x\n    - y: 2\n", "f")
    assert doc.line(("b", "c", 1, "y")) == 5
    assert doc.line(("b", "c", 1, "absent")) == 5
    assert doc.line(("absent",)) == 1


BOMB = "a0: &a0 [1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


def test_a_number_of_many_digits_is_text() -> None:
    for text in ("9" * 5000, "0x" + "9" * 5000):
        assert scalar(text) == text


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\na: 2", 2, "duplicate key 'a' (first on line 1)"),
        ("a: 1\nb: [1,", 2, "not YAML"),
        ("a: !!python/object:os.system x", 1, "tag"),
        ("a: 1\nb: !set {x: 1}", 2, "tag"),
        (BOMB, 6, "more than 100,000 values"),
        ("a: &x [*x]", 1, "contains itself"),
        ("? [1]\n: 2", 1, "a key must be a string"),
        ("\t- a", 1, "not YAML"),
    ],
)
def test_what_yaml_should_not_do_is_refused(text: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError, match=r".") as caught:
        parse(text, "recipe.yaml")
    assert words in str(caught.value)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"recipe.yaml:{line}: ")


def test_a_file_that_is_no_text(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        read(path)


WORDS = st.text(st.characters(exclude_categories=("C", "Z")))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner),
    max_leaves=20,
)


@settings(max_examples=50)
@given(st.dictionaries(WORDS, JSON))
def test_json_is_yaml(value: dict[str, object]) -> None:
    assert parse(json.dumps(value, ensure_ascii=False), "f").data == value


@given(st.text())
def test_any_text_is_parsed_or_refused_with_a_line(text: str) -> None:
    try:
        parse(text, "f")
    except RecipeError as error:
        assert str(error).startswith("f:")
