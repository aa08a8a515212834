"""The standard library of the running Python: real text that needs no download.

One rule says which functions are held out (`is_held_out` of the function's key), so that
neither pre-training nor fine-tuning sees a function that is tested.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HOLDOUT = 0.15
"""The fraction of functions held out by default, in the corpus and in the task alike."""

# Tests, tables and bundles teach nothing of the language; the rest is not on every machine.
_SKIPPED = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "sitecustomize.py",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
    "usercustomize.py",
}
# Written when Python was built: they hold the paths and flags of one machine.
_BUILD_PREFIXES = ("config-", "_sysconfig")


@dataclass(frozen=True, slots=True)
class Function:
    """A function or method that is not inside another one."""

    package: str
    """The top-level package or module, such as `asyncio`."""
    name: str
    """File and qualified name: `asyncio/locks.py:Lock.acquire`."""
    source: str
    """Decorators included, without the indentation of its class."""
    first_line: int
    last_line: int
    """Both count from 1, both are part of it."""

    @property
    def key(self) -> str:
        """The source with one kind of space only: equal for a copy at another place."""
        return " ".join(self.source.split())


@cache
def source_files() -> dict[str, Path]:
    """The files that are read, by their name below the library's folder, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_read(name)]
        for name in names:
            if name.endswith(".py") and _is_read(name):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path
    return {name: found[name] for name in sorted(found)}


def _is_read(name: str) -> bool:
    return name not in _SKIPPED and not name.startswith(_BUILD_PREFIXES)


@cache
def library_fingerprint() -> Mapping[str, str]:
    """The version of Python, and one hash over all files that are read."""
    total = hashlib.sha256()
    for name, path in source_files().items():
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {"python": platform.python_version(), "library": total.hexdigest()}


def read_source(path: Path) -> str:
    """The text of a Python file, in the encoding that it declares."""
    with tokenize.open(path) as file:
        return file.read()


def package_of(name: str) -> str:
    """The top-level package or module of a file, by its name below the library's folder."""
    return name.split("/")[0].removesuffix(".py")


def functions(name: str, text: str) -> list[Function]:
    """The outermost functions of a file, in order; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return []
    package = package_of(name)
    lines = text.split("\n")
    found: list[Function] = []
    for qualified, node in _outermost(tree, ""):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        last = node.end_lineno or node.lineno
        source = textwrap.dedent("\n".join(lines[first - 1 : last]))
        found.append(Function(package, f"{name}:{qualified}", source, first, last))
    return found


def _outermost(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _outermost(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _outermost(child, prefix)


def without(text: str, removed: Iterable[Function]) -> str:
    """The text of a file without the lines of some of its functions."""
    gone = {
        line for function in removed for line in range(function.first_line, function.last_line + 1)
    }
    lines = enumerate(text.split("\n"), start=1)
    return "\n".join(line for number, line in lines if number not in gone)


def language_reference() -> dict[str, str]:
    """The topics of Python's own help, which are sections of its language reference."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))
