"""Stages over plain numbers: real stages, small enough to see through."""

from __future__ import annotations

import os
import time
from typing import Annotated, Literal

from pydantic import BaseModel

from lifecycle.errors import DataError, GateError
from lifecycle.kinds import Bundle, Text, Tokenizer
from lifecycle.pipeline.artifact import Artifact, Metrics
from lifecycle.pipeline.registry import SETTINGS, Plugin
from lifecycle.pipeline.stage import RUNTIME, Context, Ref, SourcePath, Stage


class Number(Artifact):
    kind = "number"

    @property
    def value(self) -> int:
        return int((self.path / "value").read_text())


def write(ctx: Context, value: int) -> Metrics:
    (ctx.out / "value").write_text(str(value))
    return {"value": value}


class Shape(Plugin):
    """A family of plug-ins without any built-in."""

    group = "lifecycle.targets"


class Square(Shape):
    use: str = "square"
    side: int = 1


class Corner(BaseModel):
    model_config = SETTINGS
    height: int = 1


class Shaped(Stage):
    """Takes settings inside settings."""

    produces = Number
    shape: Shape | None = None
    corner: Corner | None = None
    size: tuple[int, int] = (1, 1)

    def run(self, ctx: Context) -> Metrics:
        return write(ctx, 0)


class Unfinished(Stage):
    """Lacks its `run`."""

    produces = Number


class Unkind(Stage):
    """Does not say what it produces."""

    def run(self, ctx: Context) -> Metrics:
        return {}


class Const(Stage):
    """A number."""

    produces = Number
    value: int = 1
    """The number itself."""
    rate: float = 0.5
    unit: Literal["meter", "foot"] = "meter"
    workers: Annotated[int, RUNTIME] = 1

    def run(self, ctx: Context) -> Metrics:
        return write(ctx, self.value)


class FromFile(Stage):
    """A number that is read from a file."""

    produces = Number
    path: SourcePath

    def run(self, ctx: Context) -> Metrics:
        return write(ctx, int(self.path.read_text()))


class Restless(FromFile):
    """Reads a number, and counts it up to 2 in its file."""

    def run(self, ctx: Context) -> Metrics:
        value = int(self.path.read_text())
        if value < 2:
            self.path.write_text(str(value + 1))
        return write(ctx, value)


class Add(Stage):
    """The sum of numbers."""

    produces = Number
    left: Ref[Number]
    others: list[Ref[Number]] = []  # noqa: RUF012
    plus: int = 0

    def run(self, ctx: Context) -> Metrics:
        total = ctx.input(self.left).value + sum(ctx.input(ref).value for ref in self.others)
        return write(ctx, total + self.plus)


class Largest(Stage):
    """The largest of some sums, each built as a recipe's entry `Add` would be."""

    produces = Number
    number: Ref[Number]
    plus: list[int]
    fail_after: Annotated[int, RUNTIME] = -1

    def run(self, ctx: Context) -> Metrics:
        sums: list[Artifact] = []
        for i, plus in enumerate(self.plus):
            if i == self.fail_after:
                raise ValueError("failed on purpose")
            made = {"the last": sums[-1]} if sums else {}
            left = self.number if not sums else Ref("the last")
            sums.append(ctx.build(f"sum {i}", f"{__file__}:Add", Add(left=left, plus=plus), made))
        best = max(sums, key=lambda found: Number(found.path, found.manifest).value)
        ctx.link(best.path)
        return {"digest": best.digest}


class Endless(Stage):
    """Builds itself."""

    produces = Number

    def run(self, ctx: Context) -> Metrics:
        ctx.build("again", f"{__file__}:Endless", Endless())
        return {}


class Bundled(Stage):
    """What could be served."""

    produces = Bundle
    fail: bool = False
    decoder: bool = True

    def run(self, ctx: Context) -> Metrics:
        if self.fail:
            raise ValueError("failed on purpose")
        if self.decoder:
            (ctx.out / "decoder.json").write_text("{}")
        return write(ctx, 0)


class Read(Stage):
    """Takes a text or a tokeniser, not a number."""

    produces = Number
    text: Ref[Text | Tokenizer]

    def run(self, ctx: Context) -> Metrics:
        return write(ctx, 0)


class Slow(Stage):
    """Counts to `steps`, and goes on from where the last attempt was."""

    produces = Number
    steps: int = 10
    pause: float = 0.0
    fail_at: Annotated[int, RUNTIME] = -1

    def run(self, ctx: Context) -> Metrics:
        state = ctx.scratch / "step"
        start = int(state.read_text()) if state.exists() else 0
        ctx.progress.log(f"from {start}")
        for step in range(start, self.steps):
            temporary = ctx.scratch / "new"
            temporary.write_text(str(step))
            temporary.replace(state)
            if step == self.fail_at:
                raise ValueError("failed on purpose")
            time.sleep(self.pause)
            ctx.progress.update(step + 1, self.steps, loss=1 / (step + 1))
        return write(ctx, self.steps)


class Deaf(Stage):
    """Never reaches a safe point."""

    produces = Number

    def run(self, ctx: Context) -> Metrics:
        time.sleep(60)
        return write(ctx, 0)


class Gate(Stage):
    """A gate that a number passes or not."""

    produces = Number
    number: Ref[Number]
    most: int

    def run(self, ctx: Context) -> Metrics:
        value = ctx.input(self.number).value
        if value > self.most:
            raise GateError(f"value is {value}, the bound is <= {self.most}", {"value": value})
        return write(ctx, value)


class Misbehaving(Stage):
    """Breaks the rules of what an output may be."""

    produces = Number
    how: str

    def run(self, ctx: Context) -> Metrics:
        match self.how:
            case "empty":
                return {}
            case "link":
                (ctx.out / "value").symlink_to("/etc/hostname")
            case "data":
                raise DataError("data.jsonl:3: no JSON")
            case "space":
                raise OSError(28, os.strerror(28))
            case "nothing":
                return write(ctx, 1) and None  # type: ignore[return-value]
            case "path":
                return write(ctx, 1) | {"where": ctx.out}
            case "nan":
                return write(ctx, 1) | {"loss": float("nan")}
            case "torch" | "elsewhere" as name:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)
            case other:
                raise RuntimeError(other)
        return {}
