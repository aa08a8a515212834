"""An artifact: a directory of files plus `artifact.json`, named by the hash of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lifecycle.errors import CorruptArtifactError
from lifecycle.pipeline.files import sha256

MANIFEST = "artifact.json"
FORMAT = 1

Metrics = dict[str, Any]
"""What a stage measured: JSON values by name."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact: path relative to its directory, size in bytes, SHA-256."""

    path: str
    size: int
    sha256: str


def with_article(kind: str) -> str:
    """A kind as a sentence names one: `an onnx-graph`, `a report`, but `arrays`."""
    if kind.endswith("s"):
        return kind
    return f"an {kind}" if kind.startswith(("a", "e", "hf", "i", "o")) else f"a {kind}"


def canonical_json(value: object) -> bytes:
    """`value` as JSON with one spelling only, so that equal values have equal hashes.

    File names need not be Unicode; `json.loads` of the bytes gives them back.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8", "surrogatepass")


def digest_of(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`, in hexadecimal."""
    return sha256(canonical_json(value))


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk_files(root: Path) -> Iterator[Path]:
    """All regular files below `root`, sorted, without the manifest at the top."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path != root / MANIFEST and path.is_file():
                yield path


def hash_tree(root: Path) -> tuple[FileEntry, ...]:
    """The entries of all files below `root`, sorted by path."""
    entries = (
        FileEntry(p.relative_to(root).as_posix(), p.stat().st_size, hash_file(p))
        for p in walk_files(root)
    )
    return tuple(sorted(entries, key=lambda entry: entry.path))


def artifact_digest(kind: str, files: tuple[FileEntry, ...]) -> str:
    """The name of an artifact: the hash of its kind and of its files' paths and hashes."""
    return digest_of({"kind": kind, "files": [[f.path, f.sha256] for f in files]})


class Artifact:
    """A stored result. Subclasses are the kinds; each knows how to open its own files."""

    kind: ClassVar[str] = "artifact"

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def digest(self) -> str:
        """SHA-256 over kind and files."""
        return str(self.manifest["digest"])

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that were recorded when the artifact was made."""
        return tuple(FileEntry(**entry) for entry in self.manifest["files"])

    @property
    def metrics(self) -> Metrics:
        """What the stage that made it measured."""
        return dict(self.manifest.get("metrics", {}))

    @property
    def made_by(self) -> Mapping[str, Any]:
        """Stage, version, settings and input digests that made it."""
        return dict(self.manifest.get("made_by", {}))

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            CorruptArtifactError: a file is missing, changed or was added.
        """
        recorded = {entry.path: entry for entry in self.files}
        present = {p.relative_to(self.path).as_posix(): p for p in walk_files(self.path)}
        for name, entry in recorded.items():
            path = present.get(name)
            if path is None:
                raise CorruptArtifactError(f"{self.path / name} is missing")
            if path.stat().st_size != entry.size or hash_file(path) != entry.sha256:
                raise CorruptArtifactError(f"{path} has changed since it was recorded")
        if extra := sorted(present.keys() - recorded.keys()):
            raise CorruptArtifactError(f"{self.path / extra[0]} does not belong there")
        if artifact_digest(self.manifest["kind"], self.files) != self.digest:
            raise CorruptArtifactError(f"{self.path / MANIFEST} has changed since it was recorded")
