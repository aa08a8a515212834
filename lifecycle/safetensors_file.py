"""Tensors in safetensors files, read block by block as float32, without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lifecycle.errors import CheckpointError

BLOCK = 1 << 18
"""Elements per block: 1 MB of float32, which is read, checked and written from a core's cache.
Blocks of 16 MB take twice the time."""

LARGEST_HEADER = 100_000_000
"""Bytes; no reader of the format takes more."""
_MOST_DIMENSIONS, _LARGEST_DIMENSION = 64, 2**63
_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of a tensor lie."""

    name: str
    file: Path
    offset: int
    size: int
    """Bytes."""
    dtype: str
    """`F32`, `F16` or `BF16` where it can be read."""
    shape: tuple[int, ...]

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.float32]]:
        """The values in order, flat, `BLOCK` at a time; those from `start` to `stop` if they are
        given. A block is overwritten by the next one.

        Raises:
            CheckpointError: the tensor has another type or is not finite, or the file ends early.
        """
        if self.dtype not in _STORED:
            raise CheckpointError(
                f"{self.file}: {self.name} is stored as {self.dtype}; "
                f"only {', '.join(_STORED)} can be read"
            )
        stop = prod(self.shape) if stop is None else stop
        size = min(BLOCK, stop - start)
        stored, values = np.empty(size, _STORED[self.dtype]), np.empty(size, np.float32)
        # Plain reads, not a memory map: touched pages of a map count as memory of the process.
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * stored.itemsize)
            for at in range(start, stop, BLOCK):
                count = min(BLOCK, stop - at)
                _read_exactly(file, stored[:count], self.file)
                block = _widen(stored[:count], values[:count])
                if not np.isfinite(block).all():
                    raise CheckpointError(
                        f"{self.file}: {self.name} holds values that are not finite; "
                        "training has diverged or the file is damaged"
                    )
                yield block

    def read(self) -> NDArray[np.float32]:
        """The whole tensor in memory.

        Raises:
            CheckpointError: as `blocks`.
        """
        values = np.empty(self.shape, np.float32)
        flat, done = values.reshape(-1), 0
        for block in self.blocks():
            flat[done : done + len(block)] = block
            done += len(block)
        return values


def read_header(file: Path, largest: int = LARGEST_HEADER) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name (format: huggingface.co/docs/safetensors).

    Args:
        largest: bytes that its header may have; some 150 for each tensor are usual.

    Raises:
        CheckpointError: the file is damaged or cut off.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            if length > largest:
                raise ValueError(f"its header has {length} bytes; at most {largest} are taken")
            header: Any = json.loads(stream.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
        except (struct.error, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is no safetensors file: {error}") from None
    entries = cast("dict[str, object]", header)
    entries.pop("__metadata__", None)
    start = 8 + length
    found = {name: _read_entry(file, start, name, entry) for name, entry in entries.items()}
    _check_places(file, found.values(), start, size)
    return found


def _check_places(file: Path, tensors: Iterable[StoredTensor], start: int, size: int) -> None:
    """As the format demands, tensors lie one behind the other from `start` to the end of the file: so no file
    is larger than what is read of it."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{file}: {tensor.name} begins at byte {tensor.offset}, and what is before it ends at {end}; "
                "copy the file again"
            )
        end += tensor.size
    if end > size:
        raise CheckpointError(f"{file} is cut off: {size} bytes of {end}")
    if end < size:
        raise CheckpointError(
            f"{file} has {size} bytes, of which only {end} hold tensors; copy it again"
        )


def _read_entry(file: Path, start: int, name: str, entry: object) -> StoredTensor:
    """One tensor of a header; offsets count from `start`."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end and _is_shape(shape)
        ):
            tensor = StoredTensor(name, file, start + begin, end - begin, dtype, tuple(shape))
        case _:
            raise CheckpointError(
                f"{file}: {name}: its header has no tensor there but {entry!r:.200}; copy the file again"
            )
    if dtype in _STORED and tensor.size != prod(tensor.shape) * _STORED[dtype].itemsize:
        raise CheckpointError(
            f"{file}: {name}: {tensor.size} bytes do not hold {dtype} {list(tensor.shape)}; "
            "copy the file again"
        )
    return tensor


def _is_shape(shape: Sequence[object]) -> bool:
    # Sizes without bounds multiply to a number that takes hours to compute.
    return len(shape) <= _MOST_DIMENSIONS and all(
        isinstance(n, int) and 0 <= n < _LARGEST_DIMENSION for n in shape
    )


def _widen(stored: NDArray[Any], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """`stored` as float32: itself, or converted into `values`."""
    if stored.dtype == np.float32:
        return stored
    if stored.dtype == np.uint16:
        # bfloat16 is the upper half of a float32.
        bits = values.view(np.uint32)
        bits[:] = stored
        np.left_shift(bits, 16, out=bits)
    else:
        values[:] = stored
    return values


def _read_exactly(stream: FileIO, block: NDArray[Any], file: Path) -> None:
    left = block.data.cast("B")
    while left:
        count = stream.readinto(left)
        if not count:
            raise CheckpointError(f"{file} ends too early; copy it again")
        left = left[count:]
