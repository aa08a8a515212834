from __future__ import annotations

from pathlib import Path

import pytest

from lifecycle.errors import CheckpointError
from lifecycle.json_file import read_object


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "a.json is missing"),
        (b"{", "a.json is damaged: Expecting"),
        (b"\xff", "a.json is damaged: 'utf-8'"),
        (b"[" * 100_000, "a.json is damaged: maximum recursion"),
        (b"[1]", "a.json is damaged: it holds no JSON object"),
    ],
)
def test_what_is_no_object_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_object(path)


def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_object(path) == {"a": [1, "ü"]}
