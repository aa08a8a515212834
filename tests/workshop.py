"""A workshop for recipes over the toy stages of `tests.pipeline.toys`."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lifecycle.errors import LifecycleError
from lifecycle.pipeline.plan import Planned, plan
from lifecycle.pipeline.progress import PlainDisplay
from lifecycle.pipeline.recipe import Recipe, load
from lifecycle.pipeline.runner import Runner
from lifecycle.pipeline.runs import Run
from lifecycle.pipeline.store import Store

TOYS = Path(__file__).with_name("pipeline") / "toys.py"


class Workshop:
    """Writes recipes into a folder of its own, runs them there, on one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store_path = root / "store"
        self.error: LifecycleError | None = None
        self.said = ""

    def write(self, stages: str, name: str = "recipe.yaml", head: str = "name: toy\n") -> Path:
        """A recipe; `toy:X` in it means the toy stage X."""
        path = self.root / name
        path.write_text(head + "stages:\n" + stages.replace("toy:", f"{TOYS}:"))
        return path

    def load(self, stages: str, *overrides: str) -> Recipe:
        return load(str(self.write(stages)), overrides)

    @property
    def store(self) -> Store:
        return Store.open(self.store_path)

    def run(self, stages: str, *overrides: str, **options: Any) -> Run:
        stream = io.StringIO()
        runner = Runner(self.store, PlainDisplay(stream))
        run, self.error = runner.run(self.load(stages, *overrides), overrides, **options)
        self.said = stream.getvalue()
        return run

    def plan(self, stages: str, *overrides: str) -> dict[str, Planned]:
        return plan(self.load(stages, *overrides), self.store)

    def command(self, *args: str) -> subprocess.Popen[str]:
        """`lifecycle ARGS` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "lifecycle.cli", *args],
            cwd=self.root,
            env=os.environ | {"LIFECYCLE_STORE": str(self.store_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def statuses(run: Run) -> str:
    """`a=done b=cached`."""
    return " ".join(f"{name}={stage.status}" for name, stage in run.stages.items())
