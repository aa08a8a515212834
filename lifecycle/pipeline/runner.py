"""Running a recipe: what is cached is taken, the rest is made, in order."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, cast

from lifecycle.errors import (
    CorruptArtifactError,
    DataError,
    InterruptedRun,
    LifecycleError,
    MissingExtraError,
    StageError,
)
from lifecycle.pipeline import files, runs
from lifecycle.pipeline.artifact import Artifact, Metrics
from lifecycle.pipeline.plan import action_of, sources_of
from lifecycle.pipeline.progress import Display, StageProgress, Stop, brief
from lifecycle.pipeline.recipe import Entry, Recipe
from lifecycle.pipeline.runs import Run, StageRun
from lifecycle.pipeline.stage import Builder, Context, Stage, kind_made, references
from lifecycle.pipeline.store import NO_SPACE, Action, Record, Store, disk_errors

GRACE_SECONDS = 10
"""How long a stage has, after the first signal, to reach a safe point."""


class Runner:
    """Runs recipes on one store."""

    def __init__(self, store: Store, display: Display) -> None:
        self.store, self.display = store, display
        self.stop = Stop()
        self._making: list[str] = []

    def run(
        self,
        recipe: Recipe,
        overrides: Iterable[str] = (),
        until: str | None = None,
        force: Iterable[str] = (),
    ) -> tuple[Run, LifecycleError | None]:
        """Run what is not cached, in order, up to the first failure.

        Returns:
            The record of the run, and the error that ended it if it failed.
        """
        entries = recipe.until(until)
        forced = {recipe.require(name).name for name in force}
        run = Run(
            runs.new_id(), recipe.name, recipe.source, list(overrides), "running", time.time(),
            os.getpid(), {e.name: self._blank(e) for e in entries},
        )  # fmt: skip
        folder = runs.folder(self.store, run.run)
        with self.store.in_use(), disk_errors(self.store.root):
            folder.mkdir(parents=True)
            text = json.dumps(recipe.resolved(), indent=1)
            files.write_atomic(folder / "recipe.json", text.encode())
            runs.save(self.store, run)
            error = self._run_all(run, entries, forced)
            run.status, run.ended = ("failed" if error else "ok"), time.time()
            if isinstance(error, InterruptedRun):
                run.status = "interrupted"
            runs.save(self.store, run)
        return run, error

    def _blank(self, entry: Entry) -> StageRun:
        return StageRun(entry.use, kind=entry.kind.kind, inputs=dict(entry.inputs))

    def _run_all(self, run: Run, entries: list[Entry], forced: set[str]) -> LifecycleError | None:
        made: dict[str, Artifact] = {}
        with self._signals():
            for entry in entries:
                state = run.stages[entry.name]
                try:
                    made[entry.name] = self._stage(entry, made, run, entry.name in forced)
                except (LifecycleError, KeyboardInterrupt) as caught:
                    error = _interrupted(caught)
                    state.status = "failed"
                    state.error = str(error)
                    state.metrics = finite(getattr(error, "metrics", {}))
                    self.display.ended(entry.name, entry.use, "failed", state.seconds, "")
                    return error
                runs.save(self.store, run)
        return None

    def _stage(self, entry: Entry, made: Mapping[str, Artifact], run: Run, force: bool) -> Artifact:
        """Take the stage's artifact from the store, or make it."""
        if self.stop.requested:
            raise InterruptedRun("interrupted")
        state, kind = run.stages[entry.name], entry.kind
        action = action_of(entry, {f: made[n].digest for f, n in entry.inputs.items()})
        state.key = action.key
        rows = runs.folder(self.store, run.run) / f"{entry.name}.jsonl"
        progress = StageProgress(entry.name, entry.use, self.display, rows, self.stop)

        def make() -> Record:
            self.display.started(entry.name, entry.use)
            state.status = "running"
            runs.save(self.store, run)  # with the key, so that `gc` keeps the scratch
            begin = time.monotonic()
            try:
                return self._make(entry, action, made, progress, run)
            finally:
                state.seconds = round(time.monotonic() - begin, 3)

        record, status = self._obtain(action, kind, progress, make, force)
        artifact = self.store.artifact(record.digest, kind)
        state.status, state.digest, state.path = status, record.digest, str(artifact.path)
        state.metrics = record.metrics
        self.display.ended(entry.name, entry.use, status, state.seconds, brief(record.metrics))
        return artifact

    def _obtain(
        self,
        action: Action,
        kind: type[Artifact],
        progress: StageProgress,
        make: Callable[[], Record],
        force: bool = False,
    ) -> tuple[Record, Literal["cached", "done"]]:
        """What the store has of an action, else what `make` records, with the key's lock held."""
        if action.key in self._making:  # It would wait for itself.
            raise StageError(f"the stage {action.use} builds itself, with the same settings")
        with self.store.lock(
            action.key, lambda: progress.log("waiting for another run to make it")
        ):
            record = None if force else self._sound(action.key, kind, progress)
            if record is not None:
                return record, "cached"
            self._making.append(action.key)
            try:
                return make(), "done"
            finally:
                self._making.pop()

    def _sound(self, key: str, kind: type[Artifact], progress: StageProgress) -> Record | None:
        """The record of a key if its artifact is intact; a damaged one is removed."""
        record = self.store.record(key)
        if record is not None:
            try:
                self.store.artifact(record.digest, kind)
            except CorruptArtifactError as error:
                progress.log(f"{error}; making it again")
                self.store.discard(record.digest)
                return None
        return record

    def _make(
        self,
        entry: Entry,
        action: Action,
        made: Mapping[str, Artifact],
        progress: StageProgress,
        run: Run,
    ) -> Record:
        out = self.store.new_output(action.key)
        try:
            inputs = {field: made[name] for field, name in entry.inputs.items()}
            by_name = {name: made[name] for name in entry.inputs.values()}
            scratch = self.store.scratch(action.key)
            build = self._builder(progress, run)
            ctx = Context(entry.name, inputs, out, scratch, progress, by_name, build)
            begin = time.monotonic()
            with disk_errors(self.store.root), _named(entry, progress):
                metrics = finite(entry.stage.run(ctx))
                _unchanged(entry, action)
            seconds = round(time.monotonic() - begin, 3)
            return self.store.commit(
                action, out, entry.kind, metrics, seconds, lineage(inputs.values())
            )
        finally:
            files.remove_tree(out)

    def _builder(self, progress: StageProgress, run: Run) -> Builder:
        """How a stage whose progress this is builds others on its way."""
        built = run.stages[progress.name].built

        def build(name: str, use: str, stage: Stage, inputs: Mapping[str, Artifact]) -> Artifact:
            needed = {field: str(ref) for field, ref in references(stage).items()}
            kind = kind_made(stage, {field: type(inputs[n]) for field, n in needed.items()})
            entry = Entry(name, use, stage, needed, kind)
            action = action_of(entry, {field: inputs[n].digest for field, n in needed.items()})
            inner = progress.within(name)

            def make() -> Record:
                built[action.key] = None
                runs.save(self.store, run)
                return self._make(entry, action, inputs, inner, run)

            record, status = self._obtain(action, kind, inner, make)
            built[action.key] = record.digest
            runs.save(self.store, run)
            progress.log(f"{name}: {use} {status}")
            return self.store.artifact(record.digest, kind)

        return build

    @contextmanager
    def _signals(self) -> Generator[None]:
        """The first Ctrl-C or SIGTERM asks the stage to stop at its next safe point; the second,
        or ten seconds without one, stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop.requested:
                raise KeyboardInterrupt
            self.stop.requested = True
            self.display.log("", "stopping at the next safe point; once more to stop at once")
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

        def now(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        wanted = {signal.SIGINT: ask, signal.SIGTERM: ask, signal.SIGALRM: now}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)


def _unchanged(entry: Entry, action: Action) -> None:
    """Refuse a result whose sources are no longer those of its key: what the stage has read may
    be the old bytes, the new ones or some of both."""
    for name, now in sources_of(entry.stage).items():
        if action.source.get(name) != now:
            where = getattr(entry.stage, name, None)
            what = f"{name} ({where})" if where is not None else f"its source '{name}'"
            raise DataError(
                f"{entry.name}: {what} changed while the stage read it; nothing was kept, run again"
            )


@contextmanager
def _named(entry: Entry, progress: StageProgress) -> Generator[None]:
    """Any failure of a stage as one error; what is not ours keeps its traceback with the run."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted") from None
    except LifecycleError:
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise StageError(f"{type(error).__name__}: {error}") from error
    except ModuleNotFoundError as error:
        missing = MissingExtraError.explain(f"the stage {entry.use}", error)
        raise missing or StageError(f"{type(error).__name__}: {error}") from error
    except MemoryError as error:
        raise StageError(f"{entry.use} ran out of memory") from error
    except Exception as error:
        if "No space left on device" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        progress.log(traceback.format_exc())
        raise StageError(f"{type(error).__name__}: {error}") from error


def lineage(inputs: Iterable[Artifact]) -> list[dict[str, Any]]:
    """Every ancestor of an artifact with these inputs, each once, the oldest first."""
    found: dict[str, dict[str, Any]] = {}
    for artifact in inputs:
        made = dict(artifact.made_by)
        for ancestor in made.pop("lineage", []):
            found.setdefault(ancestor["digest"], ancestor)
        own = {"digest": artifact.digest, "kind": artifact.kind}
        found.setdefault(artifact.digest, {**own, **made})
    return list(found.values())


def _interrupted(error: LifecycleError | KeyboardInterrupt) -> LifecycleError:
    return error if isinstance(error, LifecycleError) else InterruptedRun("interrupted")


def finite(value: object) -> Metrics:
    """Metrics that JSON can hold: NaN and infinity become null.

    Raises:
        StageError: they are no mapping, or hold something that JSON has no word for.
    """

    def clean(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, Mapping):
            pairs = cast("Mapping[str, Any]", item)
            return {str(key): clean(part) for key, part in pairs.items()}
        if isinstance(item, (list, tuple)):
            return [clean(part) for part in cast("list[Any]", item)]
        if item is None or isinstance(item, (str, int, float)):
            return item
        raise StageError(f"a metric must be a number, a text, a list or a dict, not {item!r}")

    if not isinstance(value, Mapping):
        raise StageError(f"run() must return what it measured as a dict, not {value!r}")
    return clean(value)


def continuation(recipe: Recipe, overrides: Iterable[str], options: Iterable[str] = ()) -> str:
    """The command that goes on where a failed run stopped."""
    return shlex.join(["lifecycle", "run", recipe.source, *overrides, *options])
