"""What a person sees while stages run: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import IO, Any, Protocol

from lifecycle.errors import InterruptedRun

DRAW_EVERY = 0.1
PLAIN_EVERY = 10.0
RECORD_EVERY = 1.0


class Stop:
    """Whether the run was asked to stop, by a signal."""

    def __init__(self) -> None:
        self.requested = False


class Display(Protocol):
    """Shows the progress of a run."""

    def started(self, name: str, use: str) -> None:
        """A stage begins."""
        ...

    def advance(
        self, name: str, phase: str, done: float, total: float | None, metrics: dict[str, float]
    ) -> None:
        """A stage is so far."""
        ...

    def log(self, name: str, message: str) -> None:
        """A stage, or the run itself when `name` is empty, has something to say."""
        ...

    def ended(self, name: str, use: str, status: str, seconds: float, metrics: str) -> None:
        """A stage ended."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


def brief(metrics: dict[str, Any], limit: int = 3) -> str:
    """The first few numbers of some metrics on one line."""
    numbers = [(k, v) for k, v in metrics.items() if isinstance(v, (int, float))]
    return "  ".join(f"{k} {number(v)}" for k, v in numbers[:limit])


def number(value: float) -> str:
    """A number as people write it: 1,234 or 0.0123."""
    if isinstance(value, bool):
        return str(value).lower()
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


class PlainDisplay:
    """One line per event, for logs and pipes."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self._last = 0.0

    def _write(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()

    def started(self, name: str, use: str) -> None:
        """Say that a stage begins."""
        self._last = time.monotonic()
        self._write(f"[{name}] {use}: started")

    def advance(
        self, name: str, phase: str, done: float, total: float | None, metrics: dict[str, float]
    ) -> None:
        """Say how far a stage is, every ten seconds."""
        now = time.monotonic()
        if now - self._last < PLAIN_EVERY:
            return
        self._last = now
        of = f"/{number(total)}" if total else ""
        count = f" {number(done)}{of}" if done or total else ""
        self._write(f"[{name}] {phase}{count}  {brief(dict(metrics))}".rstrip())

    def log(self, name: str, message: str) -> None:
        """Pass a line on."""
        self._write(f"[{name}] {message}" if name else message)

    def ended(self, name: str, use: str, status: str, seconds: float, metrics: str) -> None:
        """Say how a stage ended."""
        self._write(f"[{name}] {use}: {status} in {seconds:.1f} s  {metrics}".rstrip())

    def close(self) -> None:
        """Nothing to do."""


class LiveDisplay:
    """A bar for the running stage, a line for each that ended."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.fields[stage]}", style="bold", markup=False),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task: Any = None

    def started(self, name: str, use: str) -> None:
        """Put up the bar."""
        self._task = self._bar.add_task(use, total=None, stage=name, note="")

    def advance(
        self, name: str, phase: str, done: float, total: float | None, metrics: dict[str, float]
    ) -> None:
        """Move the bar."""
        self._bar.update(
            self._task, description=phase, completed=done, total=total, note=brief(dict(metrics))
        )

    def log(self, name: str, message: str) -> None:
        """Print above the bar."""
        self.console.print(f"{name}: {message}" if name else message, markup=False, style="dim")

    def ended(self, name: str, use: str, status: str, seconds: float, metrics: str) -> None:
        """Replace the bar by a line."""
        from rich.text import Text

        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        color = {"cached": "blue", "done": "green", "failed": "red"}.get(status, "yellow")
        took = "" if status in ("cached", "skipped") else f"{seconds:7.1f} s"
        line = Text.assemble(
            (f"{status:>7} ", color), (f"{name:<14}", "bold"), f" {use:<16} {took:>9}  ",
            (metrics, "dim"),
        )  # fmt: skip
        self.console.print(line)

    def close(self) -> None:
        """Take the bar down."""
        self._bar.stop()


class StageProgress:
    """The `Progress` that a stage is given: draws, records, and stops when asked to."""

    def __init__(self, name: str, use: str, display: Display, record: Path, stop: Stop) -> None:
        self.name, self._display, self._record, self._stop = name, display, record, stop
        self._prefix = ""
        self._phase = use
        self._drawn = self._recorded = 0.0

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop."""
        return self._stop.requested

    def update(self, done: float, total: float | None = None, **metrics: float) -> None:
        """See `stage.Progress`."""
        self._check()
        now = time.monotonic()
        finished = total is not None and done >= total
        if finished or now - self._drawn >= DRAW_EVERY:
            self._drawn = now
            self._display.advance(self.name, self._phase, done, total, metrics)
        if metrics and (finished or now - self._recorded >= RECORD_EVERY):
            self._recorded = now
            row = {"time": round(time.time(), 3), "phase": self._phase, "done": done, **metrics}
            with self._record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def phase(self, name: str) -> None:
        """See `stage.Progress`."""
        self._check()
        self._phase = self._prefix + name
        # It may take long to its first update, or have none.
        self._display.advance(self.name, self._phase, 0, None, {})

    def log(self, message: str) -> None:
        """See `stage.Progress`."""
        self._display.log(self.name, message)
        with self._record.with_suffix(".log").open("a", encoding="utf-8") as file:
            file.write(message + "\n")

    def within(self, name: str) -> StageProgress:
        """What a stage is given that this one builds; its phases begin with `name`."""
        inner = StageProgress(self.name, name, self._display, self._record, self._stop)
        inner._prefix = f"{self._prefix}{name}: "
        return inner

    def _check(self) -> None:
        if self._stop.requested:
            raise InterruptedRun("interrupted")
