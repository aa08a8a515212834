"""Reading safetensors block by block, as float32, without torch and without holding a model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lifecycle.errors import CheckpointError
from lifecycle.pipeline.suggest import did_you_mean

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK = 1 << 18
"""Elements per block: 1 MB of float32, which is read, checked and written from a core's cache.
Blocks of 16 MB take twice the time."""

_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of a tensor lie."""

    file: Path
    offset: int
    size: int
    """Bytes."""
    dtype: str
    """`F32`, `F16` or `BF16`."""
    shape: tuple[int, ...]


class Checkpoint:
    """The weights of a Hugging Face folder: one safetensors file, or shards with an index."""

    def __init__(self, folder: Path) -> None:
        """Read the headers, not the weights.

        Raises:
            CheckpointError: weights that are missing, incomplete or only in pickled form.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            self.tensors |= _read_header(file)
        self.unread = set(self.tensors)
        """Names that nobody has asked for."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._find(name).shape

    def blocks(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor in order, flat, `BLOCK` at a time; those from `start` to `stop`
        if they are given. A block is overwritten by the next one.

        Raises:
            CheckpointError: the tensor is missing, has another type or is not finite.
        """
        tensor = self._find(name)
        self.unread.discard(name)
        stop = prod(tensor.shape) if stop is None else stop
        size = min(BLOCK, stop - start)
        stored, values = np.empty(size, _STORED[tensor.dtype]), np.empty(size, np.float32)
        # Plain reads, not a memory map: touched pages of a map count as memory of the process.
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start * stored.itemsize)
            for at in range(start, stop, BLOCK):
                count = min(BLOCK, stop - at)
                _read_exactly(file, stored[:count], tensor.file)
                block = _widen(stored[:count], values[:count])
                if not np.isfinite(block).all():
                    raise CheckpointError(
                        f"{tensor.file}: {name} holds values that are not finite; "
                        "training has diverged or the file is damaged"
                    )
                yield block

    def matrix(self, name: str) -> NDArray[np.float32]:
        """A whole tensor in memory.

        Raises:
            CheckpointError: as `blocks`.
        """
        values = np.empty(self.shape(name), np.float32)
        flat, done = values.reshape(-1), 0
        for block in self.blocks(name):
            flat[done : done + len(block)] = block
            done += len(block)
        return values

    def _find(self, name: str) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.folder}: no tensor '{name}' in its weights"
                f"{did_you_mean(name, self.tensors)}"
            )
        if tensor.dtype not in _STORED:
            raise CheckpointError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}; "
                f"only {', '.join(_STORED)} can be exported"
            )
        return tensor


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


def _weight_files(folder: Path) -> list[Path]:
    # The single file first, as transformers does.
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in _read_index(index)]
        for file in files:
            if file.parent != folder:
                raise CheckpointError(f"{index}: shard '{file}' lies outside the folder")
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, though {INDEX} names it")
        return files
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
        raise CheckpointError(
            f"{pickled[0]} is a pickle, which can run any code when it is read; "
            "save the model as safetensors"
        )
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")


def _read_index(index: Path) -> list[str]:
    """The names of the shards, sorted."""
    try:
        found: object = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is no JSON: {error}; copy it again") from None
    match found:
        case {"weight_map": dict(shards)} if all(isinstance(s, str) for s in shards.values()):
            return sorted(set(shards.values()))
        case _:
            raise CheckpointError(
                f"{index} is damaged: it has no weight_map from tensors to files; copy it again"
            )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file (format: huggingface.co/docs/safetensors)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header: Any = json.loads(stream.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
        except (struct.error, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is no safetensors file: {error}") from None
    entries = cast("dict[str, object]", header)
    entries.pop("__metadata__", None)
    start = 8 + length
    found = {name: _read_entry(file, start, name, entry) for name, entry in entries.items()}
    end = max((tensor.offset + tensor.size for tensor in found.values()), default=start)
    if end > size:
        raise CheckpointError(f"{file} is cut off: {size} bytes of {end}")
    return found


def _read_entry(file: Path, start: int, name: str, entry: object) -> StoredTensor:
    """One tensor of a header; offsets count from `start`."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end and all(isinstance(n, int) and n >= 0 for n in shape)
        ):
            tensor = StoredTensor(file, start + begin, end - begin, dtype, tuple(shape))
        case _:
            raise CheckpointError(
                f"{file}: {name}: its header has no tensor there but {entry!r}; copy the file again"
            )
    if dtype in _STORED and tensor.size != prod(tensor.shape) * _STORED[dtype].itemsize:
        raise CheckpointError(
            f"{file}: {name}: {tensor.size} bytes do not hold {dtype} {list(tensor.shape)}; "
            "copy the file again"
        )
    return tensor
