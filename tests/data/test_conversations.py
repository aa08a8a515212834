from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lifecycle.data.conversations import check_conversation, load_conversations
from lifecycle.errors import DataError

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
TOOL = {"role": "tool", "content": "1"}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_a_model_can_learn_from() -> None:
    check_conversation([USER, ASSISTANT])
    check_conversation([{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT])
    check_conversation([USER, CALL, TOOL, TOOL, ASSISTANT])
    check_conversation([USER, {**ASSISTANT, "train": False}, USER, ASSISTANT])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no message of the assistant"),
        ([USER], "no message of the assistant"),
        ([USER, {**ASSISTANT, "train": False}], "no message of the assistant"),
        ([USER, ASSISTANT, USER], "the last message is the user's"),
        ([ASSISTANT], "message 1: the assistant cannot speak at the beginning"),
        ([USER, USER], "message 2: the user cannot speak after a message of the user"),
        ([USER, ASSISTANT, ASSISTANT], "message 3: the assistant cannot speak after"),
        ([USER, {"role": "asistant", "content": "a"}], "did you mean 'assistant'"),
        ([USER, {"role": "assistant", "content": " \n"}], "message 2: the content is empty"),
        ([USER, {"role": "assistant", "content": 1}], "message 2: the content is no text"),
        ([USER, {"role": "assistant"}], "message 2: the content is no text"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": []}], "the content is empty"),
        ([{**CALL, "role": "user", "content": ""}, ASSISTANT], "message 1: the content is empty"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_what_it_cannot(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_conversation(messages)


def test_bad_rows_are_an_error_that_names_the_first_few(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a"}] + [{"prompt": "q", "completion": ""}] * 9
    with pytest.raises(DataError) as error:
        load_conversations(jsonl(tmp_path / "x.jsonl", rows))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path / 'x.jsonl'} has unusable rows:"
    assert lines[1] == "  line 2: message 2: the content is empty"
    assert len(lines) == 7 and lines[-1].endswith("'on_bad_row: drop'")


def test_values_that_json_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [USER, {**ASSISTANT, "name": name}]} for name in (None, b"x")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"row 2: messages\[1\]\.name is b'x', which JSON cannot"):
        load_conversations(tmp_path / "x.parquet")


def test_dropped_rows_are_counted_by_reason_with_their_lines(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    rows = [good, {"text": "x"}, *[good] * 12, {"prompt": "", "completion": "a"}]
    loaded = load_conversations(jsonl(tmp_path / "x.jsonl", rows), drop_bad_rows=True)
    assert loaded.summary() == {
        "format": "prompt-completion",
        "read": 15,
        "kept": 1,
        "dropped": {
            "duplicate": {"count": 12, "lines": list(range(3, 13))},
            "message 1: the content is empty": {"count": 1, "lines": [15]},
            next(r for r in loaded.dropped if r.startswith("the keys 'text' fit no format")): {
                "count": 1,
                "lines": [2],
            },
        },
    }
    assert str(loaded.dropped["duplicate"]) == "12 (at 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, …)"


def test_mixed_formats_and_malformed_lines_are_errors_even_when_rows_may_be_dropped(
    tmp_path: Path,
) -> None:
    path = jsonl(
        tmp_path / "x.jsonl",
        [{"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}],
    )
    with pytest.raises(DataError, match=r"line 1 is prompt-completion, .*line 2 is alpaca"):
        load_conversations(path, drop_bad_rows=True)
    path.write_text('{"prompt": "q", "completion": "a"}\n{"prompt"\n')
    with pytest.raises(DataError, match="line 2, column 10: malformed JSON"):
        load_conversations(path, drop_bad_rows=True)


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "q", "completion": " "}])
    with pytest.raises(DataError, match="no usable row; the first of them:\n  line 1"):
        load_conversations(path, drop_bad_rows=True)


def test_system_message_and_number_of_rows(tmp_path: Path) -> None:
    rows = [{"prompt": str(i // 2), "completion": "a"} for i in range(10)]
    rows.append({"prompt": "q", "completion": "a", "system": "own"})
    path = jsonl(tmp_path / "x.jsonl", rows)
    loaded = load_conversations(path, system="be brief", max_rows=3)
    questions = [messages[1]["content"] for messages in loaded.conversations.values()]
    assert questions == ["0", "1", "2"]
    systems = [m[0] for m in load_conversations(path, system="be brief").conversations.values()]
    assert [message["content"] for message in systems] == ["be brief"] * 5 + ["own"]
