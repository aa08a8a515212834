"""The store: an action cache over content-addressed artifacts.

store.json            the format of the store
objects/<digest>/     artifacts, read-only
records/<key>.json    what a key gave; written last, by rename, after fsync
locks/<key>.lock      one process works on a key at a time
scratch/<key>/        what an unfinished attempt left for the next one
tmp/                  outputs that are being written
runs/<id>/            what each run did (see `runs`)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from lifecycle.errors import CorruptArtifactError, StageError, StoreError
from lifecycle.pipeline import files
from lifecycle.pipeline.artifact import (
    FORMAT as ARTIFACT_FORMAT,
)
from lifecycle.pipeline.artifact import (
    MANIFEST,
    Artifact,
    Metrics,
    artifact_digest,
    canonical_json,
    digest_of,
    hash_tree,
)

FORMAT = 1
DEFAULT = ".lifecycle"
VARIABLE = "LIFECYCLE_STORE"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

MARKER = "store.json"
DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_PLACE = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR)
_OWN = re.compile(r"\.gitignore|\.(\.gitignore|store\.json)\..*")
"""What stands in the folder while a store is being made: its first file, and temporary ones."""

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Action:
    """What is about to be computed; its hash is the key of the result."""

    use: str
    version: int
    settings: Mapping[str, Any]
    """Without references, source paths and runtime settings."""
    inputs: Mapping[str, str]
    """Digests of the input artifacts by field."""
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fingerprints of what is read from outside the store."""

    @property
    def key(self) -> str:
        """SHA-256 of all of it."""
        return digest_of(asdict(self))


@dataclass(frozen=True)
class Record:
    """What an action gave."""

    key: str
    digest: str
    action: Action
    metrics: Metrics
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As written to `records/`."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """As read from `records/`."""
        if not DIGEST.fullmatch(value["digest"]):  # it becomes part of a path
            raise ValueError(f"{value['digest']!r} is no digest")
        action = Action(**value["action"])
        return cls(value["key"], value["digest"], action, value["metrics"], value["seconds"])


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder; nothing if it does not exist."""
    return folder.iterdir() if folder.exists() else iter(())


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn a full or read-only disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StoreError(
                f"no space left below {path}; nothing was recorded: free some space "
                "(`lifecycle gc` helps) or choose another place with --store, then run again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, *_NO_PLACE):
            raise StoreError(
                f"{error.filename or path}: {error.strerror}; a store needs a folder that can be "
                "written: choose another place with --store"
            ) from error
        raise


class Store:
    """One store on disk. Any number of processes may use it at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """Open or create the store at `path`, `$LIFECYCLE_STORE` or `./.lifecycle`.

        Raises:
            StoreError: it was written by a newer version, cannot be written, or the folder has
                other things in it.
        """
        store = cls.look(path)
        with disk_errors(store.root):
            if not store.exists:
                if not store.root.exists() or not any(store.root.iterdir()):
                    files.write_atomic(store.root / ".gitignore", b"*\n")
                files.write_atomic(store.root / MARKER, canonical_json({"format": FORMAT}))
            for name in ("objects", "records", "locks", "scratch", "tmp", "runs"):
                (store.root / name).mkdir(exist_ok=True)
        return store

    @classmethod
    def look(cls, path: Path | None = None) -> Self:
        """The store as `open` finds it, without writing anything: where there is none, one with
        nothing in it.

        Raises:
            StoreError: as `open` does.
        """
        root = (path or Path(os.environ.get(VARIABLE) or DEFAULT)).expanduser().absolute()
        marker = root / MARKER
        with disk_errors(root):
            try:
                found = json.loads(marker.read_text(encoding="utf-8"))["format"]
            except FileNotFoundError:
                # What `gc` may remove must be what a store has made.
                if other := next((p.name for p in _entries(root) if not _OWN.match(p.name)), None):
                    raise StoreError(
                        f"{root} is no store, and has other things in it ('{other}'): choose an "
                        "empty or a new folder with --store"
                    ) from None
                return cls(root)
            except (ValueError, KeyError, TypeError, NotADirectoryError) as error:
                raise StoreError(f"{root} is no store: {marker} cannot be read") from error
        if found != FORMAT:
            raise StoreError(
                f"{root} has format {found}, this version reads {FORMAT}: upgrade "
                "lifecycle-toolkit, or choose another place with --store"
            )
        return cls(root)

    @property
    def exists(self) -> bool:
        """Whether it has been made."""
        return (self.root / MARKER).is_file()

    def require(self) -> Self:
        """This store.

        Raises:
            StoreError: it has not been made yet.
        """
        if not self.exists:
            raise StoreError(
                f"there is no store at {self.root}: `lifecycle run` makes one; --store or "
                f"{VARIABLE} names another place"
            )
        return self

    def record(self, key: str) -> Record | None:
        """What the key gave, if its artifact is there too; a damaged record counts as none."""
        try:
            value = json.loads((self.root / "records" / f"{key}.json").read_bytes())
            record = Record.from_json(value)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return record if self.path(record.digest).is_dir() else None

    def path(self, digest: str) -> Path:
        """Where an artifact lies."""
        return self.root / "objects" / digest

    def artifact(self, digest: str, kind: type[A], verify: bool = True) -> A:
        """Open an artifact; its bytes are checked once in the life of this object.

        Raises:
            CorruptArtifactError: it is damaged or gone.
        """
        path = self.path(digest)
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            artifact = kind(path, manifest)
            if artifact.digest != digest:
                raise CorruptArtifactError(f"{path / MANIFEST} belongs to another artifact")
            if verify and digest not in self._verified:
                artifact.verify()
                self._verified.add(digest)
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(f"{path / MANIFEST} is missing or damaged") from error
        return artifact

    def discard(self, digest: str) -> None:
        """Remove a damaged artifact, so that it is made again."""
        self._verified.discard(digest)
        doomed = self._temporary(f"discard-{digest[:16]}")
        if self.path(digest).exists():
            self.path(digest).rename(doomed)
            files.remove_tree(doomed)

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Generator[None]:
        """Hold the key: another process that wants it waits, after `on_wait` is called."""
        with self._flock(self.root / "locks" / f"{key}.lock", fcntl.LOCK_EX, on_wait):
            yield

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Keep `gc` away while a run is going on."""
        with self._flock(self.root / "locks" / "store.lock", fcntl.LOCK_SH, lambda: None):
            yield

    @contextmanager
    def exclusive(self) -> Generator[None]:
        """Keep runs away.

        Raises:
            StoreError: a run is using the store.
        """

        def refuse() -> None:
            raise StoreError(f"a run is using {self.root}: try again when it has ended")

        with self._flock(self.root / "locks" / "store.lock", fcntl.LOCK_EX, refuse):
            yield

    @contextmanager
    def _flock(self, path: Path, kind: int, on_wait: Callable[[], None]) -> Generator[None]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(fd, kind)
            yield
        finally:
            os.close(fd)

    def _temporary(self, name: str) -> Path:
        path = self.root / "tmp" / f"{name}-{os.getpid()}"
        files.remove_tree(path)
        return path

    def scratch(self, key: str) -> Path:
        """The folder that survives failed attempts at a key."""
        path = self.root / "scratch" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def new_output(self, key: str) -> Path:
        """An empty folder for the output of a key; call it with the key's lock held."""
        path = self.root / "tmp" / key
        files.remove_tree(path)
        path.mkdir(parents=True)
        return path

    def commit(
        self,
        action: Action,
        out: Path,
        kind: type[Artifact],
        metrics: Metrics,
        seconds: float,
        lineage: list[dict[str, Any]],
    ) -> Record:
        """Turn `out` into an artifact and record it as what the action gave.

        Everything is on disk before the record is, and the record appears by rename: a crash
        leaves either no trace or the whole.
        """
        key = action.key
        _refuse_odd_files(out)
        entries = hash_tree(out)
        digest = artifact_digest(kind.kind, entries)
        manifest = {
            "format": ARTIFACT_FORMAT,
            "kind": kind.kind,
            "digest": digest,
            "files": [asdict(entry) for entry in entries],
            "metrics": metrics,
            "made_by": {**asdict(action), "key": key, "lineage": lineage},
        }
        with disk_errors(self.root):
            # Never written through: it may be a link to the manifest of another artifact.
            (out / MANIFEST).unlink(missing_ok=True)
            (out / MANIFEST).write_bytes(canonical_json(manifest))
            files.make_read_only(out)
            files.fsync_tree(out)
            with self.lock(digest):  # another key may be giving the same bytes
                self._move_in(out, digest, kind)
            record = Record(key, digest, action, metrics, seconds)
            files.write_atomic(
                self.root / "records" / f"{key}.json",
                json.dumps(record.to_json(), allow_nan=False).encode(),
            )
            files.remove_tree(self.root / "scratch" / key)
        self._verified.add(digest)
        return record

    def _move_in(self, out: Path, digest: str, kind: type[Artifact]) -> None:
        """Give `out` its place, unless a sound artifact of the same bytes has it already."""
        try:
            self.artifact(digest, kind)
        except CorruptArtifactError:
            self.discard(digest)
        else:
            files.remove_tree(out)
            return
        try:
            out.rename(self.path(digest))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            files.remove_tree(out)
        files.fsync_dir(self.root / "objects")


def _refuse_odd_files(out: Path) -> None:
    empty = True
    for folder, folders, names in os.walk(out):
        for name in (*folders, *names):
            if Path(folder, name).is_symlink():
                raise StageError(f"the stage wrote a symbolic link, {name}; write the file itself")
        empty = empty and not names
    if empty:
        raise StageError("the stage wrote no file into its output folder")
