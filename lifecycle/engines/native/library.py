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
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

from lifecycle.engines.native import Kernels
from lifecycle.errors import EngineError

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent / "src"
_FAST = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
"""Instructions without which ours are not known to be faster."""
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    # Vectors never cross the border of the library, and compilers' own headers leave values undefined on purpose.
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
)
_LONGEST = 300
"""Seconds that a compiler may take."""
_LOCK = Lock()
_found: list[Path | EngineError] = []
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
                _found.append(error)
                if wanted == "auto":
                    _log.warning("engines use ONNX Runtime's kernels: %s", error)
        found = _found[0]
    if not isinstance(found, EngineError):
        return found
    if wanted == "native":
        raise found
    return None


def why_not() -> str | None:
    """Why `auto` does without our kernels, None where it uses them."""
    missing = sorted(_FAST - instruction_sets())
    if missing:
        return f"this processor has no {', '.join(missing)}"
    if not _is_kept() and _compiler() is None:
        return "there is no C++ compiler (c++, g++ or clang++, or the one that CXX names)"
    return None


def library_path() -> Path:
    """Where the library for this processor is, or will be."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((FLAGS, platform.machine(), sorted(instruction_sets()))).encode())
    return _folder() / f"kernels-{digest.hexdigest()[:16]}.so"


@lru_cache(maxsize=1)
def instruction_sets() -> frozenset[str]:
    """What the processor can do, as its system names it; empty where that is not known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def forget() -> None:
    """Look for the library again, as a new process would."""
    _found.clear()


def _library() -> Path:
    path = library_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(path.parent)
        with (path.parent / "lock").open("a") as lock:
            # Of several processes that start at once, one compiles.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_kept():
                _compile(path)
    except OSError as error:
        raise EngineError(f"kernels cannot be kept in {path.parent}: {error.strerror}") from error
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        # As where the system has an older library of C++ than the compiler.
        raise EngineError(f"native kernels were compiled and cannot be loaded: {error}") from error
    return path


def _compile(path: Path) -> None:
    """Compile the library, as a whole or not at all."""
    compiler = _compiler()
    if compiler is None:
        raise EngineError(
            "native kernels are compiled where they run, and there is no C++ compiler: install one "
            "(c++, g++ or clang++), let CXX name it, or use ONNX Runtime's kernels (kernels: onnxruntime)"
        )
    _log.warning("compiling kernels for this processor, once: %s", path)
    processor = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        sources = map(str, sorted(_SOURCES.glob("*.cpp")))
        command = [compiler, *FLAGS, processor, *sources, "-o", str(made)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_LONGEST
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"native kernels could not be compiled: {error}") from error
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [
                done.stderr.strip()[-500:]
            ]
            raise EngineError(
                f"native kernels could not be compiled with {compiler}: {lines[0]} "
                "(CXX may name another compiler; it needs C++20)"
            )
        with made.open("rb") as library:
            os.fsync(library.fileno())
        made.replace(path)


def _is_kept() -> bool:
    return library_path().is_file()


def _compiler() -> str | None:
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _folder() -> Path:
    """Of this user: what is in it is run."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not Path(base).is_absolute():
        with suppress(RuntimeError):
            base = str(Path.home() / ".cache")
    return Path(base) / "lifecycle" / "kernels"


def _check_owner(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        raise EngineError(
            f"others may write to {folder}, and what is in it is run: take that right away "
            f"(chmod go-w {folder}), or let XDG_CACHE_HOME name another folder"
        )
