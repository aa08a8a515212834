"""Samples for any graph: arrays from npz, npy and JSON files, held to the inputs of the graph."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lifecycle.data.read import READERS, read_rows
from lifecycle.engines.limits import available_memory
from lifecycle.errors import DataError
from lifecycle.pipeline.suggest import did_you_mean

Sample = dict[str, NDArray[Any]]
"""An array for each input of a graph."""

_ARRAYS = (".npz", ".npy")
_DAMAGE = (
    *(OSError, ValueError, EOFError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
    RuntimeError,  # An encrypted archive, or one of a kind that zipfile does not know.
)
"""What numpy and zipfile raise for files that are none of theirs."""


@dataclass(frozen=True, slots=True)
class Input:
    """What a graph takes under a name; dimensions with names are free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def read_samples(path: Path, inputs: Sequence[Input]) -> Iterator[Sample]:
    """The samples of a file or folder, in order.

    In a folder every `.npz` file is a sample, and for a graph with one input every `.npy` file.
    One such file holds many samples along its first axis: each takes as many rows as the graph's
    first dimension says, one where it is free; an array with an axis more than the input holds a
    sample per entry. In jsonl and other files of rows each row is a sample, input by input; the
    first axis may be left out where it is 1.

    Raises:
        DataError: what cannot be read, and what does not fit the inputs: names the file, the
            sample and the input.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _ARRAYS)
        if not files:
            raise DataError(f"{path} has no file that ends in {' or '.join(_ARRAYS)}")
        for file in files:
            yield _fitted(_load(file, inputs), inputs, str(file))
    elif path.suffix in _ARRAYS:
        yield from _split(_load(path, inputs), inputs, path)
    elif path.suffix.lower() in READERS:
        for row in read_rows(path):
            place = f"{path}, {row.place}"
            yield _fitted(_row(row.values, inputs, place), inputs, place)
    else:
        raise DataError(
            f"{path} is none of {', '.join((*_ARRAYS, *sorted(READERS)))}, nor a folder"
        )


def _load(file: Path, inputs: Sequence[Input]) -> Sample:
    """The arrays of a file by name; nothing is unpickled."""
    try:
        # Opened here: numpy leaves a file open that turns out to be damaged.
        with file.open("rb") as stream:
            return _arrays(np.load(stream, allow_pickle=False), inputs, file)
    except _DAMAGE as error:
        raise DataError(f"{file} cannot be read as arrays of numbers: {error}") from error


def _arrays(found: Any, inputs: Sequence[Input], file: Path) -> Sample:
    if isinstance(found, np.ndarray):
        if len(inputs) != 1:
            names = ", ".join(port.name for port in inputs)
            raise DataError(f"{file} holds one array, but the graph takes {names}: use .npz")
        return {inputs[0].name: found}
    _require_names(dict.fromkeys(found.files), inputs, str(file))
    _require_memory(file, found.zip)
    return {name: _array(found[name], name, file) for name in found.files}


def _array(found: Any, name: str, file: Path) -> NDArray[Any]:
    """A member of an archive, which numpy gives as bytes where it is no array."""
    if not isinstance(found, np.ndarray):
        raise DataError(f"{file}: '{name}' is no array")
    return cast("NDArray[Any]", found)


def _require_memory(file: Path, archive: zipfile.ZipFile) -> None:
    """A few bytes of an archive can stand for more than a machine holds."""
    size, free = sum(member.file_size for member in archive.infolist()), available_memory()
    if free is not None and size > free:
        raise DataError(
            f"{file} unpacks to {size >> 20} MiB, and {free >> 20} MiB are free: split it into a "
            "folder of smaller files"
        )


def _split(arrays: Sample, inputs: Sequence[Input], file: Path) -> Iterator[Sample]:
    """The samples of a file that holds many of them."""
    _require_names(arrays, inputs, str(file))
    parts: dict[str, tuple[int, Callable[[int], NDArray[Any]]]] = {}
    for port in inputs:
        parts[port.name] = _parts(arrays[port.name], port, file)
    counts = {name: count for name, (count, _) in parts.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} for '{name}'" for name, count in counts.items())
        raise DataError(f"{file} has different numbers of samples: {told}")
    for number in range(next(iter(counts.values()), 0)):
        sample = {name: part(number) for name, (_, part) in parts.items()}
        yield _fitted(sample, inputs, f"{file}, sample {number + 1}")


def _parts(
    array: NDArray[Any], port: Input, file: Path
) -> tuple[int, Callable[[int], NDArray[Any]]]:
    """How many samples an array holds, and how to take one."""
    if array.ndim == len(port.shape) + 1:
        return len(array), lambda number: array[number]
    if array.ndim != len(port.shape) or not array.ndim:
        raise DataError(
            f"{file}: '{port.name}' has shape {list(array.shape)}; samples for "
            f"{_spelled(port.shape)} need as many dimensions, or one more in front"
        )
    rows = port.shape[0] if isinstance(port.shape[0], int) else 1
    if len(array) % rows:
        raise DataError(f"{file}: '{port.name}' has {len(array)} rows, no multiple of {rows}")
    return len(array) // rows, lambda number: array[number * rows : (number + 1) * rows]


def _row(values: Mapping[str, Any], inputs: Sequence[Input], place: str) -> Sample:
    _require_names(values, inputs, place)
    found: Sample = {}
    for port in inputs:
        try:
            array = np.array(values[port.name])
        except ValueError as error:
            raise DataError(f"{place}: '{port.name}' is no array: {error}") from error
        may_be_added = port.shape[:1] == (1,) or isinstance(next(iter(port.shape), 0), str)
        if array.ndim == len(port.shape) - 1 and may_be_added:
            array = array[None]
        found[port.name] = array
    return found


def _fitted(arrays: Sample, inputs: Sequence[Input], place: str) -> Sample:
    """The arrays with the types and shapes that the graph takes."""
    _require_names(arrays, inputs, place)
    sizes: dict[str, tuple[int, str]] = {}
    found: Sample = {}
    for port in inputs:
        array = _typed(arrays[port.name], port, place)
        fits = len(array.shape) == len(port.shape) and all(
            isinstance(wanted, str) or wanted == size
            for wanted, size in zip(port.shape, array.shape, strict=True)
        )
        if not fits:
            raise DataError(
                f"{place}: '{port.name}' has shape {list(array.shape)}, the graph takes "
                f"{_spelled(port.shape)}"
            )
        for name, size in zip(port.shape, array.shape, strict=True):
            if isinstance(name, str) and name != "?":
                known, where = sizes.setdefault(name, (size, port.name))
                if known != size:
                    raise DataError(
                        f"{place}: '{name}' is {known} in '{where}' but {size} in '{port.name}'"
                    )
        found[port.name] = np.ascontiguousarray(array)
    return found


def _typed(array: NDArray[Any], port: Input, place: str) -> NDArray[Any]:
    """The same numbers in the graph's type; those that it cannot hold are refused."""
    try:
        wanted = np.dtype(port.dtype)
    except TypeError as error:
        raise DataError(f"'{port.name}' takes {port.dtype}, of which no arrays are read") from error
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}.get(wanted.kind, wanted.kind)
    if array.dtype.kind not in kinds:
        raise DataError(f"{place}: '{port.name}' is {array.dtype}, the graph takes {wanted}")
    with np.errstate(over="ignore", invalid="ignore"):
        found = array.astype(wanted)
    if wanted.kind == "f":
        if not np.isfinite(found).all():
            raise DataError(f"{place}: '{port.name}' has values that are not finite in {wanted}")
    elif not np.array_equal(found, array):
        raise DataError(f"{place}: '{port.name}' has values that {wanted} cannot hold")
    return found


def _require_names(found: Mapping[str, Any], inputs: Sequence[Input], place: str) -> None:
    names = [port.name for port in inputs]
    for name in found:
        if name not in names:
            hint = did_you_mean(name, names)
            raise DataError(f"{place}: the graph has no input '{name}'{hint} ({', '.join(names)})")
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{place}: '{missing[0]}' is missing; the graph takes {', '.join(names)}")


def _spelled(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
