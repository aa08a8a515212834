"""Snapshots of a running training: whole or absent, checked when read, one kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lifecycle.errors import StoreError
from lifecycle.pipeline.artifact import hash_file
from lifecycle.pipeline.files import fsync_dir

_STATE = "state"


@dataclass(frozen=True)
class Snapshot:
    """What a training needs to go on as if it had not stopped."""

    step: int
    """Optimiser steps done."""
    tensors: dict[str, Tensor]
    """Weights and optimiser state."""
    state: Mapping[str, float | None]
    """Other numbers, by name."""


class Snapshots:
    """The snapshots in a folder, named `{step}-{first digits of the SHA-256}.safetensors`."""

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self._folder = folder
        self._log = log

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot and remove older ones.

        Raises:
            StoreError: it could not be written, such as on a full disk.
        """
        temporary = self._folder / ".writing"
        metadata = {_STATE: json.dumps(dict(snapshot.state))}
        try:
            save_file(snapshot.tensors, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(f"cannot write a snapshot to {self._folder}: {error}") from error
        path = self._folder / f"{snapshot.step:08d}-{_digest(temporary)}.safetensors"
        temporary.replace(path)
        fsync_dir(self._folder)
        for old in self._paths():
            if old != path:
                old.unlink()

    def latest(self) -> Snapshot | None:
        """The newest whole snapshot; damaged ones are passed over with a line in the log."""
        for path in reversed(self._paths()):
            try:
                return _read(path)
            except (SafetensorError, OSError, ValueError) as error:
                self._log(f"snapshot {path.name} is damaged and ignored: {error}")
        return None

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*-*.safetensors"))


def _digest(path: Path) -> str:
    return hash_file(path)[:16]


def _read(path: Path) -> Snapshot:
    step, _, digest = path.stem.partition("-")
    if _digest(path) != digest:
        raise ValueError("its bytes are not those that were written")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return Snapshot(int(step), load_file(path), json.loads(metadata[_STATE]))
