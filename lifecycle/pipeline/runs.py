"""The record of every run: what was asked, what each stage did, and where its result lies."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lifecycle.errors import RecipeError, StoreError
from lifecycle.pipeline import files
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.store import Store
from lifecycle.pipeline.suggest import did_you_mean

Status = Literal["cached", "done", "failed", "skipped", "running", "killed"]


@dataclass
class StageRun:
    """What a run did for one stage."""

    use: str
    status: Status = "skipped"
    seconds: float = 0.0
    digest: str | None = None
    path: str | None = None
    metrics: Metrics = field(default_factory=dict[str, Any])
    key: str | None = None
    kind: str = ""
    inputs: dict[str, str] = field(default_factory=dict[str, str])
    """Names of the inputs by field."""
    built: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    """What the stage built on its way: digests by key, None while it is being made."""
    error: str | None = None


@dataclass
class Run:
    """One run of a recipe."""

    run: str
    recipe: str
    source: str
    overrides: list[str]
    status: str
    started: float
    pid: int
    stages: dict[str, StageRun]
    ended: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As written to `run.json`."""
        return {"format": 1, **asdict(self)}

    def result(self) -> dict[str, Any]:
        """What `lifecycle run --json` prints."""
        shown = ("use", "status", "seconds", "digest", "path", "metrics", "error")
        stages = {
            name: {k: v for k, v in asdict(stage).items() if k in shown and (k != "error" or v)}
            for name, stage in self.stages.items()
        }
        return {"run": self.run, "recipe": self.recipe, "status": self.status, "stages": stages}


def new_id() -> str:
    """A name that sorts by time, to the millisecond: `20261123-170501-417-3f2a`."""
    now = time.time()
    second = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return f"{second}-{int(now * 1000) % 1000:03d}-{secrets.token_hex(2)}"


def folder(store: Store, run_id: str) -> Path:
    """Where a run keeps its record, metrics and logs."""
    return store.root / "runs" / run_id


def save(store: Store, run: Run) -> None:
    """Write `run.json`, whole or not at all."""
    text = json.dumps(run.to_json(), indent=1, allow_nan=False)
    files.write_atomic(folder(store, run.run) / "run.json", text.encode())


def _read(path: Path) -> Run | None:
    try:
        value = json.loads(path.read_bytes())
        value.pop("format")
        stages = {name: StageRun(**stage) for name, stage in value.pop("stages").items()}
        run = Run(**value, stages=stages)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    if run.run != path.parent.name:  # a copy, or a name that would lead elsewhere
        return None
    if run.status == "running" and not _alive(run.pid):
        run.status = "killed"
        for stage in run.stages.values():
            if stage.status == "running":
                stage.status = "killed"
    return run


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def newest_first(store: Store) -> Iterator[Run]:
    """All runs of a store."""
    found = (_read(path) for path in (store.root / "runs").glob("*/run.json"))
    yield from sorted(filter(None, found), key=lambda run: run.started, reverse=True)


def find(store: Store, name: str) -> Run:
    """The run with this id or unique beginning of one, or the newest of the recipe so named.

    Raises:
        RecipeError: there is none, or several.
    """
    runs = list(newest_first(store))
    matches = [run for run in runs if run.run == name] or [r for r in runs if r.recipe == name][:1]
    matches = matches or [run for run in runs if run.run.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        found = ", ".join(run.run for run in matches[:5])
        raise RecipeError(f"'{name}' begins the names of several runs: {found}")
    known = {run.recipe for run in runs} | {run.run for run in runs}
    raise RecipeError(f"no run or recipe '{name}' in {store.root}{did_you_mean(name, known)}")


def find_folder(name: str, store: Path | None = None) -> Path:
    """The folder that a command was asked to work on.

    Args:
        name: a folder; or the id of a run or the name of a recipe, whose last bundle is taken; or
            `NAME/STAGE`, the newest artifact that this stage of it has made.
        store: the store's folder; None takes the default place.

    Raises:
        RecipeError: a file, or no such run or stage.
        StoreError: there is no store, the run made no bundle, or the artifact is gone.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise RecipeError(
            f"{path} is a file: name the folder that it is in, or a recipe by its name, not its file"
        )
    run, _, stage = name.rpartition("/")
    return find_made(run, stage, store) if run else find_bundle(name, store)


def find_made(name: str, stage: str, store: Path | None = None) -> Path:
    """What a stage made in the newest run of that name that has it; the run may have failed later.

    Raises:
        RecipeError: no such run or stage.
        StoreError: there is no store, or the artifact is gone.
    """
    opened = _look(f"{name}/{stage}", store)
    found = [run for run in newest_first(opened) if name in (run.recipe, run.run)]
    found = found or [find(opened, name)]
    for run in found:
        if stage in run.stages and (digest := run.stages[stage].digest):
            return _made(opened, digest, run)
    made = sorted({key for run in found for key, value in run.stages.items() if value.digest})
    raise RecipeError(
        f"no run of '{name}' has made '{stage}'{did_you_mean(stage, made)} "
        f"(made: {', '.join(made) or 'nothing'})"
    )


def find_bundle(name: str, store: Path | None = None) -> Path:
    """The bundle that the last successful run of that name made.

    Args:
        name: the id of a run, or the name of a recipe.
        store: the store's folder; None takes the default place.

    Raises:
        RecipeError: no such run.
        StoreError: it made no bundle, or the bundle is gone.
    """
    opened = _look(name, store)
    good = [r for r in newest_first(opened) if r.status == "ok" and name in (r.recipe, r.run)]
    run = good[0] if good else find(opened, name)
    if run.status != "ok":
        raise StoreError(f"run {run.run} of '{run.recipe}' is {run.status}: it has no bundle")
    made = [s.digest for s in run.stages.values() if s.kind == "bundle" and s.digest]
    if not made:
        raise StoreError(f"run {run.run} of '{run.recipe}' made no bundle")
    return _made(opened, made[-1], run)


def _look(name: str, store: Path | None) -> Store:
    opened = Store.look(store)
    try:
        opened.require()
    except StoreError as error:
        raise StoreError(f"'{name}' is neither a folder nor a run: {error}") from None
    return opened


def _made(store: Store, digest: str, run: Run) -> Path:
    path = store.path(digest)
    if not path.is_dir():
        raise StoreError(f"{path} is gone; make it again with: lifecycle run {run.source}")
    return path
