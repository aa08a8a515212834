"""Grammars are compiled in a process of their own first: llguidance bounds what most grammars take, but some
of a few kilobytes run for ever, fill the memory or overflow the stack, which would end a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from lifecycle.errors import RequestError

_CHILD = Path(__file__).with_name("child.py")


class Trial:
    """A process that compiles grammars, started when it is first needed and again after its death.
    Thread-safe; one grammar at a time."""

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        """`tokenizer` is what `child` reads first."""
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def run(self, grammar: str, limits: Mapping[str, int], seconds: float) -> int:
        """Compile a grammar there; the bytes that it takes, 0 where that is not known.

        Raises:
            RequestError: it is invalid, too slow or too large.
        """
        asked = {"grammar": grammar, "limits": limits, "seconds": seconds}
        with self._lock:
            process = self._process or self._start()
            answer = _ask(process, asked)
            if answer is None:
                self._stop(process)
                raise RequestError(
                    f"the grammar takes more than {seconds:g} s or too much memory to compile; use one "
                    "with fewer alternatives, shorter bounds or less nesting"
                )
        if error := answer["error"]:
            raise RequestError(f"the grammar cannot be used: {_first_lines(error)}")
        return answer["num_bytes"]

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._stop(self._process)

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if _ask(process, self._tokenizer) is None:
            self._stop(process)
            raise RequestError(
                "grammars cannot be compiled: this machine has no room for a process"
            )
        self._process = process
        return process

    def _stop(self, process: subprocess.Popen[str]) -> None:
        self._process = None
        # Its pipes too; what could not be written to it is lost.
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stdin):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass


def _ask(process: subprocess.Popen[str], asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """One line there and back; None if the process has died."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _first_lines(error: str) -> str:
    """The library's text without what it quotes of the grammar behind it."""
    lines = [line.strip() for line in error.splitlines()]
    said = [line for line in lines if line and not line.startswith(("|", "<"))]
    return "; ".join(said)[:300]
