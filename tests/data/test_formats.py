from __future__ import annotations

from typing import Any

import pytest

from lifecycle.data.formats import Detector, load_format
from lifecycle.errors import DataError, PluginError

EXCHANGE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("messages", {"messages": EXCHANGE, "id": 7}, EXCHANGE),
        (
            "messages",
            {
                "messages": [
                    EXCHANGE[0],
                    {**EXCHANGE[1], "weight": 0, "name": None, "refusal": None},
                ]
            },
            [EXCHANGE[0], {**EXCHANGE[1], "train": False}],
        ),
        (
            "messages",
            {"messages": [EXCHANGE[0], {**CALL, "content": None}, EXCHANGE[1]]},
            [EXCHANGE[0], {**CALL, "content": ""}, EXCHANGE[1]],
        ),
        (
            "messages",
            {"messages": [EXCHANGE[0], CALL, EXCHANGE[1]]},
            [EXCHANGE[0], {**CALL, "content": ""}, EXCHANGE[1]],
        ),
        (
            "sharegpt",
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            [SYSTEM, *EXCHANGE],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "q", "weight": None},
                    {"from": "gpt", "value": "a", "weight": 0.0},
                ],
                "tools": [],
            },
            [EXCHANGE[0], {**EXCHANGE[1], "train": False}],
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, EXCHANGE),
        (
            "alpaca",
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            [SYSTEM, {"role": "user", "content": "q\n\ni"}, EXCHANGE[1]],
        ),
        ("prompt-completion", {"prompt": "q", "completion": "a"}, EXCHANGE),
        ("prompt-completion", {"prompt": "q", "response": "a"}, EXCHANGE),
        ("prompt-completion", {"question": "q", "answer": "a"}, EXCHANGE),
    ],
)
def test_rows_become_messages(
    format: str, row: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    assert load_format(format).convert(row) == expected
    detector = Detector()
    assert detector.format_of(row, "line 1").convert(row) == expected
    assert detector.name == format


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("messages", {"messages": "hi"}, "'messages' must be a list, not str"),
        ("messages", {"messages": ["hi"]}, "list of objects, not of str"),
        ("messages", {"messages": [{"role": "user"}]}, "needs 'role' and 'content'"),
        ("messages", {"messages": [{**EXCHANGE[1], "train": 0}]}, "'train' must be .*, not 0"),
        ("messages", {"messages": [{**EXCHANGE[1], "train": "false"}]}, "not 'false'"),
        ("messages", {"messages": [{**EXCHANGE[1], "weight": "0"}]}, "0 or 1, not '0'"),
        ("messages", {"messages": [{**EXCHANGE[1], "weight": 0.5}]}, "0 or 1, not 0.5"),
        (
            "messages",
            {"messages": [{**EXCHANGE[1], "reasoning_content": "hm"}]},
            "has 'reasoning_content', which would not be trained",
        ),
        ("messages", {"messages": EXCHANGE, "tools": [{"type": "function"}]}, "'tools' would not"),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": "a", "thought": "hm"}]},
            "has 'thought'",
        ),
        ("sharegpt", {"conversations": [], "tools": "[{}]"}, "'tools' would not be shown"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "needs 'from' and 'value'"),
        ("alpaca", {"instruction": "q", "output": None}, "'output' must be text, not NoneType"),
        ("prompt-completion", {"prompt": 1, "completion": "a"}, "'prompt' must be text, not int"),
        (
            "prompt-completion",
            {"prompt": "q", "completion": "a", "response": "b"},
            "both 'completion' and 'response' could be the answer",
        ),
    ],
)
def test_a_row_that_is_not_right_says_why(format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_format(format).convert(row)


def test_two_formats_in_a_file_are_refused_with_both_places() -> None:
    detector = Detector()
    detector.format_of({"prompt": "q", "completion": "a"}, "line 1")
    with pytest.raises(DataError, match="line 1 is prompt-completion, line 9 is alpaca"):
        detector.format_of({"instruction": "q", "output": "a"}, "line 9")


def test_a_row_of_two_formats_is_refused_unless_one_is_named() -> None:
    row = {"messages": EXCHANGE, "prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match=r"line 1: .* fit messages and prompt-completion; name"):
        Detector().format_of(row, "line 1")
    assert Detector("messages").format_of(row, "line 1").convert(row) == EXCHANGE


def test_a_row_of_no_format_lists_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"the keys 'text' fit no format .*alpaca: instruction"):
        Detector().format_of({"text": "x"}, "line 1")


def test_an_unknown_format_names_the_near_one() -> None:
    with pytest.raises(PluginError, match="did you mean 'sharegpt'"):
        Detector("share-gpt")
