"""Reading safetensors block by block, as float32, without torch and without holding a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.errors import CheckpointError
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.safetensors_file import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
            self.tensors |= read_header(file)
        self.unread = set(self.tensors)
        """Names that nobody has asked for."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._find(name).shape

    def blocks(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor (see `StoredTensor.blocks`).

        Raises:
            CheckpointError: the tensor is missing, has another type or is not finite.
        """
        self.unread.discard(name)
        return self._find(name).blocks(start, stop)

    def matrix(self, name: str) -> NDArray[np.float32]:
        """A whole tensor in memory.

        Raises:
            CheckpointError: as `blocks`.
        """
        self.unread.discard(name)
        return self._find(name).read()

    def _find(self, name: str) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.folder}: no tensor '{name}' in its weights"
                f"{did_you_mean(name, self.tensors)}"
            )
        return tensor


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
