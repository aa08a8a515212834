"""Rows of jsonl, json, csv and parquet files, each with its place for messages."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from lifecycle.errors import DataError, MissingExtraError

_BOM = b"\xef\xbb\xbf"
_LONGEST_CELL = 64 * 1024 * 1024
_BATCH = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")


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
            object, or longer or shorter than the header; two columns have the same name.
        MissingExtraError: parquet without pyarrow.
    """
    reader = READERS.get(path.suffix.lower())
    if not path.is_file() or reader is None:
        raise DataError(
            f"{path} is none of the files that can be read: {', '.join(sorted(READERS))}"
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


def check_json(value: Any, at: str) -> None:
    """Whether a value, which stands at `at`, can be written as JSON in UTF-8.

    Raises:
        ValueError: it cannot, or something in it cannot; names the field and the value.
    """
    match value:
        case dict():
            for key, inner in cast("dict[Any, Any]", value).items():
                check_json(key, f"a key of {at}" if at else "a key")
                check_json(inner, f"{at}.{key}" if at else str(key))
        case list() | tuple():
            for index, inner in enumerate(cast("Sequence[Any]", value)):
                check_json(inner, f"{at}[{index}]")
        case str():
            if found := _SURROGATE.search(value):
                part = value[max(0, found.start() - 20) : found.end() + 20]
                raise ValueError(f"{at} has half of a surrogate pair: {part!r}; take it out")
        case None | int():
            pass
        case float() if math.isfinite(value):
            pass
        case _:
            shown = repr(value)[:60]
            raise ValueError(f"{at} is {shown}, which JSON cannot hold; make it text or a number")


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
    try:
        # JSON spells both halves of surrogate pairs and numbers that no float can hold.
        check_json(value, "")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, {place}: {error}") from None
    return cast("dict[str, Any]", value)


def _require_distinct(columns: Sequence[str], path: Path) -> None:
    for number, column in enumerate(columns):
        if column in columns[:number]:
            raise DataError(f"{path} has two columns '{column}'; rename or remove one of them")


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
                _require_distinct(header, path)
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
            _require_distinct(file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    row = {column: _without_nulls(value) for column, value in values.items()}
                    yield Row(number, f"row {number}", row)
    # The last three: values that are no Python object, such as a date beyond the year 9999.
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise DataError(
            f"{path} is no readable parquet file behind row {number}: {error}; "
            "copy it again, or write it without such values"
        ) from error


def _without_nulls(value: Any) -> Any:
    """All structs of a column have the same keys, null where a row did not have one."""
    match value:
        case dict():
            items = cast("dict[str, Any]", value).items()
            return {key: _without_nulls(inner) for key, inner in items if inner is not None}
        case list():
            return [_without_nulls(inner) for inner in cast("list[Any]", value)]
        case _:
            return value


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""The files that hold rows, by the end of their names in lower case."""
