"""The arguments that measurements have in common."""

from __future__ import annotations

import argparse
import os


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """A parser with `--json`; `text` is the measurement's docstring, whose first line describes it."""
    parser = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    return parser


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`: as many as there are cores for this process."""
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
