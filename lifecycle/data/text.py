"""Plain documents: from files, or from the standard library of the Python that runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from lifecycle.data.python_source import (
    functions,
    language_reference,
    read_source,
    source_files,
    without,
)
from lifecycle.data.read import READERS, read_rows, read_text
from lifecycle.data.split import is_held_out
from lifecycle.errors import DataError

Unit = Literal["file", "paragraph", "line"]


class Document(NamedTuple):
    """A text, where it is from, and whether it belongs to the test split."""

    text: str
    source: str
    held_out: bool


def library_documents(holdout: float) -> Iterator[Document]:
    """The files of the standard library without their held-out functions, each such function
    as a test document, and the sections of the language reference."""
    for name, path in source_files().items():
        text = read_source(path)
        held_out = [f for f in functions(name, text) if is_held_out(f.key, holdout)]
        yield Document(without(text, held_out), name, False)
        for function in held_out:
            yield Document(function.source, function.name, True)
    for topic, text in language_reference().items():
        yield Document(text, f"topic {topic}", False)


def file_documents(
    path: Path, *, pattern: str, field: str, unit: Unit, holdout: float, seed: int
) -> Iterator[Document]:
    """The documents of a text file, of a file with rows (their `field`), or of a folder's files
    that match `pattern`.

    Raises:
        DataError: no file matches, a file is not UTF-8 or malformed, or `field` is missing.
    """
    files = sorted(file for file in path.glob(pattern) if file.is_file()) if path.is_dir() else []
    if path.is_dir() and not files:
        raise DataError(f"no file of {path} matches the pattern '{pattern}'")
    for file in files or [path]:
        name = file.relative_to(path).as_posix() if path.is_dir() else "text"
        for number, text in enumerate(_texts(file, field, unit), start=1):
            yield Document(text, f"{name}:{number}", is_held_out(text, holdout, seed))


def _texts(file: Path, field: str, unit: Unit) -> Iterator[str]:
    if file.suffix.lower() in READERS:
        for row in read_rows(file):
            text = row.values.get(field)
            if not isinstance(text, str):
                raise DataError(
                    f"{file}, {row.place}: no text in '{field}' (its keys: "
                    f"{', '.join(row.values)}); name another with 'field'"
                )
            yield text
        return
    text = read_text(file)
    if unit == "file":
        yield text
    else:
        yield from text.split("\n" if unit == "line" else "\n\n")
