from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.data.read import read_rows, read_text
from lifecycle.errors import DataError

ROWS = [{"q": 'é, "x"', "a": "line\nline"}, {"q": "2", "a": "b"}]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the file's name says."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert [row.values for row in read_rows(written(tmp_path / f"x.{suffix}", ROWS))] == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_accepted(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"x.{suffix}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.values for row in read_rows(path)] == ROWS


def test_places_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [row.place for row in read_rows(path)] == ["line 2", "line 4"]
    rows = read_rows(written(tmp_path / "x.csv", ROWS))
    assert [row.place for row in rows] == ["line 3", "line 4"]
    nested = tmp_path / "x.json"
    nested.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert [row.place for row in read_rows(nested)] == ["row 1", "row 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": }\n', r"x\.jsonl, line 2, column 7: malformed JSON"),
        ("x.jsonl", b'{"a": NaN}\n', r"line 1: malformed JSON: NaN is no JSON number"),
        ("x.jsonl", b"[" * 100_000 + b"\n", r"line 1.*malformed JSON"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"line 2: a JSON object is needed, not \[1\]"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"byte 0xff at offset 16"),
        ("x.jsonl", b'\xef\xbb\xbf{"\xff"}\n', r"byte 0xff at offset 5"),
        ("x.jsonl", b'{"a": 1}\n{"a": [{"b": "hi\\ud83d"}]}\n', r"line 2: a\[0\]\.b has half of a"),
        ("x.jsonl", b'{"\\ud800": 1}\n', r"line 1: a key has half of a surrogate pair"),
        ("x.jsonl", b'{"a": {"b": 1e999}}\n', r"line 1: a\.b is inf, which JSON cannot hold"),
        ("x.json", b'[{"a": 1}, {"a": "\\ud83d"}]', r"row 2: a has half of a surrogate pair"),
        ("x.jsonl", b"\n \n", r"has no rows"),
        ("x.jsonl", b"", r"has no rows"),
        ("x.json", b"", r"has no rows"),
        ("x.json", b"[]", r"has no rows"),
        ("x.json", b'[{"a": 1},\n {"a" 2}]', r"line 2, column 7: malformed JSON"),
        ("x.json", b'{"rows": []}', r"must hold a list of objects"),
        ("x.json", b"[1]", r"row 1: a JSON object is needed"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", r"line 3: 3 cells, but the header has 2"),
        ("x.csv", b'a,b\n"1,2\n', r"line 2: malformed CSV"),
        ("x.csv", b"a,b\n", r"has no rows"),
        ("x.csv", b"a,b,a\n1,2,3\n", r"x\.csv has two columns 'a'; rename"),
        ("x.parquet", b"PAR1 not really", r"no readable parquet file"),
        ("x.xlsx", b"", r"none of the files that can be read: \.csv"),
    ],
)
def test_bad_files_are_named_with_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n')
    assert [row.values for row in read_rows(path)] == [{"a": "\U0001f600"}]


def test_parquet_structs_lose_the_keys_of_others(tmp_path: Path) -> None:
    rows = [{"a": [{"x": {"b": 1}}], "c": None}, {"a": [{"y": 2}], "c": "d"}]
    path = written(tmp_path / "x.parquet", rows)
    assert [row.values for row in read_rows(path)] == rows


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array(["x"])
    pq.write_table(pa.table([column, column], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has two columns 'a'"):
        list(read_rows(tmp_path / "x.parquet"))


def test_parquet_values_that_python_cannot_hold_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    far = pa.array([2**58], pa.timestamp("us"))
    broken = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    )
    for column in (far, broken):
        pq.write_table(pa.table({"a": column}), path)
        with pytest.raises(DataError, match=r"x\.parquet is no readable parquet file behind row 0"):
            list(read_rows(path))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_read_as_it_is_but_for_line_ends(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(text.encode())
    assert read_text(path) == text.removeprefix("\ufeff").replace("\r\n", "\n")
