"""Runs a C++ compiler over the kernels' sources."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from lifecycle.engines.limits import usable_cores

SOURCES = Path(__file__).parent / "src"
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    # Vectors never cross the border of the library, and compilers' own headers leave values undefined on purpose.
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
)
_LONGEST = 300
"""Seconds that a file may take."""


class CompilerError(Exception):
    """What a compiler complained of."""


def compile_library(compiler: Sequence[str], flags: Sequence[str], made: Path) -> None:
    """Make a library of the sources, several of them at once.

    Raises:
        CompilerError: that was not possible.
    """
    # Those that take long first.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: path.stat().st_size, reverse=True)
    with TemporaryDirectory(prefix="objects-", dir=made.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [[*compiler, *flags, "-c", str(source)] for source in sources]
        with ThreadPoolExecutor(usable_cores()) as pool:
            # The first that fails keeps those from running that wait.
            list(pool.map(_run, commands, objects))
        _run([*compiler, "-shared", *map(str, objects)], made)


def _run(command: Sequence[str], made: Path) -> None:
    try:
        done = subprocess.run(
            [*command, "-o", str(made)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LONGEST,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(str(error)) from error
    if done.returncode or not made.is_file():
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise CompilerError(errors[0] if errors else done.stderr.strip()[-500:])


def target_flag() -> str:
    """What tells a compiler to use all that this processor has."""
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def find_compiler() -> list[str] | None:
    """The command of a compiler."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in (named, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    return None
