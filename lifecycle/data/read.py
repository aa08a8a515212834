"""Rows of jsonl, json, csv and parquet files, each with its place for messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from lifecycle.errors import DataError, MissingExtraError

_BOM = b"\xef\xbb\xbf"
_LONGEST_CELL = 64 * 1024 * 1024
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file."""

    number: int
    """Its line (jsonl, csv) or its position from 1 (json, parquet)."""
    place: str
    """The number in words: `line 12`, `row 3`."""
    values: dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order; jsonl, csv and parquet are streamed.

    Raises:
        DataError: the file is empty, of an unknown type, malformed or not UTF-8; a row is no
            object, or longer or shorter than the header.
        MissingExtraError: parquet without pyarrow.
    """
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file() or reader is None:
        raise DataError(
            f"{path} is none of the files that can be read: {', '.join(sorted(_READERS))}"
        )
    empty = True
    for row in reader(path):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} has no rows")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark and with `\\n` as line ends.

    Raises:
        DataError: it is not UTF-8; names the byte.
    """
    return "".join(_lines(path)).replace("\r\n", "\n")


def _lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            line = raw.removeprefix(_BOM) if offset == 0 else raw
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + len(raw) - len(line) + error.start
                raise DataError(
                    f"{path} is not UTF-8: byte 0x{line[error.start]:02x} at offset {at:,}; "
                    "convert it, for example with: iconv -f ENCODING -t UTF-8"
                ) from None
            offset += len(raw)


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """A JSON value; NaN and infinity are refused, since they are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise DataError(f"{path}, {place}: malformed JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        place = "" if line is None else f", line {line}"
        raise DataError(f"{path}{place}: malformed JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(value: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}, {place}: a JSON object is needed, not {json.dumps(value)[:60]}")
    return cast("dict[str, Any]", value)


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"line {number}"
            value = _parse(line.rstrip("\r\n"), path, number)
            yield Row(number, place, _object(value, path, place))


def _read_json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    if not text.strip():
        return
    found = _parse(text, path)
    if isinstance(found, dict):
        found = cast("dict[str, Any]", found).get("data")
    if not isinstance(found, list):
        raise DataError(
            f"{path} must hold a list of objects, or an object with such a list in 'data'; "
            "for one object per line name the file .jsonl"
        )
    for number, value in enumerate(cast("list[Any]", found), start=1):
        place = f"row {number}"
        yield Row(number, place, _object(value, path, place))


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = cells
            elif cells:
                place = f"line {reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, {place}: {len(cells)} cells, but the header has {len(header)}; "
                        'quote cells that contain the separator or line ends with "'
                    )
                yield Row(reader.line_num, place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: malformed CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"reading {path.name}", "data") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, f"row {number}", values)
    except pa.ArrowException as error:
        raise DataError(f"{path} is no readable parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
