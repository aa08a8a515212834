"""Files that are either whole or absent: atomic writes, fsync, links instead of copies."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

_FICLONE = 0x40049409
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EACCES}


def sha256(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make all files and names below `root` durable."""
    for folder, _, names in os.walk(root):
        for name in names:
            fd = os.open(Path(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(folder))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def _reflink(source: Path, target: Path) -> bool:
    """Share the blocks of `source`; False where the file system cannot."""
    with source.open("rb") as src, target.open("xb") as dst:
        try:
            fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
        except OSError:
            target.unlink()
            return False
    return True


def link_file(source: Path, target: Path) -> None:
    """`target` gets the bytes of `source`: by reflink, else hard link, else copy.

    A hard link is made only to a read-only file, as those of the store are.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if _reflink(source, target):
        shutil.copymode(source, target)
        return
    if not source.stat().st_mode & 0o222:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    shutil.copyfile(source, target)


def link_tree(source: Path, target: Path, skip: Path | None = None) -> None:
    """`link_file` for a file (into or as `target`) or for everything below a folder but `skip`."""
    if source.is_file():
        link_file(source, target / source.name if target.is_dir() else target)
        return
    for folder, _, names in os.walk(source):
        for path in (Path(folder, name) for name in names):
            if path != skip:
                link_file(path, target / path.relative_to(source))


def make_read_only(root: Path) -> None:
    """Take the write permission from every file below `root`."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            path.chmod(path.stat().st_mode & ~0o222)


def remove_tree(root: Path) -> None:
    """Remove a folder and all below it; a folder that is not there is fine."""
    if root.exists():
        shutil.rmtree(root)
