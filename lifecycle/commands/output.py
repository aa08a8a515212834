"""What all commands print with: JSON lines, tables, plain text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lifecycle.errors import RecipeError
from lifecycle.pipeline.progress import Display, LiveDisplay, PlainDisplay
from lifecycle.pipeline.suggest import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse with the project's way of saying that arguments are wrong."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2, one line."""
        given = message.partition("unrecognized arguments: ")[2].split("=")[0].split(" ")[0]
        hint = did_you_mean(given, self._option_string_actions) if given else ""
        raise RecipeError(f"{message}{hint} (see: {self.prog} --help)")

    def add_json(self) -> None:
        """`--json`, which every reporting command has."""
        self.add_argument("--json", action="store_true", help="print one JSON object instead")

    def add_store(self) -> None:
        """`--store`."""
        self.add_argument(
            "--store",
            type=Path,
            metavar="DIR",
            help="where artifacts are kept (default: $LIFECYCLE_STORE, else ./.lifecycle)",
        )


def emit(value: Any) -> None:
    """Print one JSON value on one line of standard output."""
    say(json.dumps(value, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """Print to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns; as wide as needed when the output is no terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading in headings:
        # A narrow terminal breaks words rather than leave their ends out.
        grid.add_column(heading, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width, markup=False, highlight=False)
    console.print(grid)


def progress_display(quiet: bool) -> Display:
    """A bar on a terminal, lines elsewhere and where it should be quiet."""
    return LiveDisplay() if sys.stderr.isatty() and not quiet else PlainDisplay()
