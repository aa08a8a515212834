"""A bundle's manifest: written when the bundle is made, checked whenever it is opened.

`manifest.json` lists every file of the bundle with its size and SHA-256, and ends with a
digest over itself, so that one changed byte anywhere is found before the model is served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, cast

from lifecycle.errors import CorruptArtifactError, StoreError
from lifecycle.pipeline import artifact
from lifecycle.pipeline.artifact import FileEntry, digest_of, hash_file, hash_tree, walk_files

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Close a bundle: list the files that lie in `folder`, and write `manifest.json`.

    Returns:
        What was written: `content` with `format`, `files` and `digest`.
    """
    files = [asdict(entry) for entry in hash_tree(folder) if entry.path != MANIFEST]
    manifest = {**content, "format": FORMAT, "files": files}
    manifest["digest"] = digest_of(manifest)
    text = json.dumps(manifest, indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def verify_bundle(path: Path) -> dict[str, Any]:
    """Check a bundle against its manifest, every byte of it, and return the manifest.

    A file that the manifest does not list is refused as well: models and templates are found
    by name, so an added `chat_template.jinja` would change every answer. Only `artifact.json`,
    which the store puts beside a bundle, may be there or not.

    Raises:
        StoreError: there is no bundle here, or a newer version made it.
        CorruptArtifactError: a file is missing, changed, added, or lies outside the folder;
            the message names it.
    """
    manifest = _read_manifest(path)
    listed = _entries(path / MANIFEST, manifest)
    for entry in listed:
        _check_file(path, entry)
    known = {entry.path for entry in listed} | {MANIFEST}
    for file in walk_files(path):
        name = file.relative_to(path).as_posix()
        if name not in known:
            raise CorruptArtifactError(f"{file} does not belong to the bundle: remove it")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{path} is no bundle: it has no {MANIFEST}; the bundle stage of a recipe makes one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise CorruptArtifactError(f"{file} is damaged: it has no format number")
    manifest = cast("dict[str, Any]", found)
    if manifest["format"] > FORMAT:
        raise StoreError(
            f"{file} has format {manifest['format']}, this version reads up to {FORMAT}: "
            "upgrade lifecycle-toolkit"
        )
    unsigned = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest.get("digest") != _digest(file, unsigned):
        raise CorruptArtifactError(f"{file} has changed since the bundle was made")
    return manifest


def _digest(file: Path, content: dict[str, Any]) -> str:
    try:
        return digest_of(content)
    except ValueError as error:
        raise CorruptArtifactError(f"{file} is damaged: {error}") from error


def _entries(file: Path, manifest: dict[str, Any]) -> list[FileEntry]:
    try:
        return [
            FileEntry(str(entry["path"]), int(entry["size"]), str(entry["sha256"]))
            for entry in manifest["files"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(f"{file} is damaged: its list of files is broken") from error


def _check_file(root: Path, entry: FileEntry) -> None:
    pure = PurePosixPath(entry.path)
    file = root / pure
    outside = pure.is_absolute() or ".." in pure.parts or not entry.path.isprintable()
    if outside or pure.name in ("", artifact.MANIFEST):
        raise CorruptArtifactError(f"{root / MANIFEST}: '{entry.path}' is no path inside a bundle")
    if not file.resolve().is_relative_to(root.resolve()):
        raise CorruptArtifactError(f"{file} points outside the bundle")
    if not file.is_file():
        raise CorruptArtifactError(f"{file} is missing")
    if file.stat().st_size != entry.size or hash_file(file) != entry.sha256:
        raise CorruptArtifactError(f"{file} has changed since the bundle was made")
