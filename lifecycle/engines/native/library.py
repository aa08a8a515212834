"""Compiles this project's kernels for the processor they will run on, once, and finds them afterwards.

They are shipped as source: what pays is to use just the instructions that a processor has, and one file per
processor and system would be many. Where there is no compiler, or where ONNX Runtime's own operators are known to be
as fast, engines use those.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import stat
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

from lifecycle.engines.native import Kernels
from lifecycle.engines.native.compiler import (
    FLAGS,
    SOURCES,
    CompilerError,
    compile_library,
    find_compiler,
    target_flag,
)
from lifecycle.errors import EngineError

_log = logging.getLogger(__name__)
_FAST = frozenset({"avx2", "fma"})
"""Instructions without which ours are not known to be faster."""
_LOCK = Lock()
_OLD = 30 * 24 * 3600
"""Seconds after which libraries of other versions go."""
_found: list[Path | str] = []
"""The library of this process, or why it has none: what failed is not tried for each engine."""


def kernels_for(wanted: Kernels) -> Path | None:
    """The library that an engine on the CPU registers, compiled if need be; None are ONNX Runtime's own kernels.

    Raises:
        EngineError: `native` is wanted and cannot be had.
    """
    if wanted == "onnxruntime" or (wanted == "auto" and why_not()):
        return None
    with _LOCK:
        if not _found:
            try:
                _found.append(_library())
            except EngineError as error:
                _found.append(str(error))
                if wanted == "auto":
                    _log.warning("engines use ONNX Runtime's kernels: %s", error)
        found = _found[0]
    if isinstance(found, Path):
        return found
    if wanted == "native":
        raise EngineError(found)
    return None


def why_not() -> str | None:
    """Why `auto` does without our kernels, None where it uses them."""
    missing = sorted(_FAST - instruction_sets())
    if missing:
        return f"this processor has no {', '.join(missing)}"
    try:
        if not is_compiled() and find_compiler() is None:
            return "there is no C++ compiler (c++, g++ or clang++, or the one that CXX names)"
    except EngineError as error:
        return str(error)
    return None


def is_compiled() -> bool:
    """Whether the library for this processor is there.

    Raises:
        EngineError: there is no folder for it.
    """
    path = library_path()
    try:
        return path.is_file()
    except OSError:
        # A folder that may not be entered.
        return False


def library_path() -> Path:
    """Where the library for this processor is, or will be.

    Raises:
        EngineError: there is no folder for it.
    """
    return _folder() / _name()


@lru_cache(maxsize=1)
def _name() -> str:
    """Another one for other sources, flags and processors."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((FLAGS, platform.machine(), sorted(instruction_sets()))).encode())
    return f"kernels-{digest.hexdigest()[:16]}.so"


@lru_cache(maxsize=1)
def instruction_sets() -> frozenset[str]:
    """What the processor can do, as its system names it; empty where that is not known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def adds_bytes_exactly() -> bool:
    """Whether ONNX Runtime's products of 8-bit weights are exact on this processor: x86 without these instructions adds
    two of them in 16 bits, which can overflow."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not is_x86 or bool(instruction_sets() & {"avx512_vnni", "avx_vnni"})


def forget() -> None:
    """Look for the library again, as a new process would."""
    _found.clear()


def _library() -> Path:
    path = library_path()
    try:
        if is_compiled():
            # Also where nothing may be written, as in an image that was made with it.
            with suppress(OSError):
                return _loaded(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        _check_owner(path.parent)
        with (path.parent / "lock").open("a") as lock:
            # Of several processes that start at once, one compiles.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _loads(path):
                _compile(path)
        return _loaded(path)
    except OSError as error:
        why = error.strerror or str(error)
        raise EngineError(f"native kernels cannot be had from {path}: {why}") from error


def _loads(path: Path) -> bool:
    """Whether a library is there that this system can use: a home may be shared by several."""
    try:
        _loaded(path)
    except OSError:
        return False
    return True


def _loaded(path: Path) -> Path:
    """A library that is in use from now on.

    Raises:
        OSError: it is not there, or made for another system.
        EngineError: somebody else may have written it.
    """
    _check_owner(path)
    ctypes.CDLL(str(path))
    return path


def _compile(path: Path) -> None:
    """Compile the library, as a whole or not at all."""
    compiler = find_compiler()
    if compiler is None:
        raise EngineError(
            "native kernels are compiled where they run, and there is no C++ compiler: install one "
            "(c++, g++ or clang++), let CXX name it, or use ONNX Runtime's kernels (kernels: onnxruntime)"
        )
    _log.warning("compiling kernels for this processor, once: %s", path)
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        try:
            compile_library(compiler, [*FLAGS, target_flag()], made)
        except CompilerError as error:
            raise EngineError(
                f"native kernels could not be compiled with {' '.join(compiler)}: {error} "
                "(CXX may name another compiler; it needs C++20)"
            ) from error
        made.chmod(0o755)
        with made.open("rb") as library:
            os.fsync(library.fileno())
        made.replace(path)
    for other in path.parent.glob("kernels-*.so"):
        # Of versions and processors that were; whoever has one open keeps it.
        with suppress(OSError):
            if other != path and time.time() - other.stat().st_mtime > _OLD:
                other.unlink()


def _folder() -> Path:
    """Of this user: what is in it is run."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not Path(base).is_absolute():
        with suppress(RuntimeError):
            base = str(Path.home() / ".cache")
    if not Path(base).is_absolute():
        raise EngineError(
            "there is no home to keep compiled kernels in: let XDG_CACHE_HOME name a folder"
        )
    return Path(base) / "lifecycle" / "kernels"


def _check_owner(path: Path) -> None:
    """What is loaded must be ours or the system's, and nobody else may put another thing in its place."""
    made = (path, path.parent, path.parent.parent)
    for place in (path, *path.parents):
        found = place.lstat()
        # In a folder such as /tmp anyone may make things, but not move those of others.
        is_shared = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        others = stat.S_IWOTH | (stat.S_IWGRP if place in made else 0)
        is_foreign = place in made and found.st_uid not in (os.geteuid(), 0)
        if is_foreign or (found.st_mode & others and not is_shared):
            raise EngineError(
                f"others own {place} or may write to it, and what is in it is run: take that right away and "
                f"delete {path}, or let XDG_CACHE_HOME name another folder"
            )
