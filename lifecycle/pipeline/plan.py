"""What a recipe's stages will compute: the action of each, and which are cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lifecycle.errors import CorruptArtifactError, DataError
from lifecycle.pipeline import registry, runs
from lifecycle.pipeline.artifact import hash_file, hash_tree
from lifecycle.pipeline.recipe import Entry, Recipe
from lifecycle.pipeline.runs import Run
from lifecycle.pipeline.stage import Stage, field_markers, ref_kinds
from lifecycle.pipeline.store import Action, Record, Store


def action_of(entry: Entry, inputs: Mapping[str, str]) -> Action:
    """What a stage will compute from inputs with the given digests."""
    stage, cls = entry.stage, type(entry.stage)
    settings = stage.model_dump(mode="json")
    source = sources_of(stage)
    for name in cls.model_fields:
        if ref_kinds(cls, name) or field_markers(cls, name) & {"runtime", "source"}:
            settings.pop(name)
        elif isinstance(value := getattr(stage, name), registry.Plugin):
            source |= _code(type(value), f"{name}.code")
    source |= _code(cls, "code")
    use = entry.use.rpartition(":")[2] if registry.is_file_use(entry.use) else entry.use
    return Action(use, cls.version, settings, inputs, source)


def sources_of(stage: Stage) -> dict[str, Any]:
    """What a stage reads from outside the store, by field, as hashes or versions."""
    found = dict(stage.fingerprint())
    for name in type(stage).model_fields:
        value = getattr(stage, name)
        if value is not None and "source" in field_markers(type(stage), name):
            found[name] = _fingerprint(value)
    return found


def _code(cls: type, name: str) -> dict[str, str]:
    code = registry.source_hash(cls)
    return {} if code is None else {name: code}


def _fingerprint(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_fingerprint(item) for item in cast("list[Path]", value)]
    path = cast(Path, value)
    try:
        if path.is_dir():
            return {entry.path: entry.sha256 for entry in hash_tree(path)}
        return {path.name: hash_file(path)}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Planned:
    """Whether a stage is cached, and if not, why."""

    status: str
    because: list[str]


def plan(recipe: Recipe, store: Store, until: str | None = None) -> dict[str, Planned]:
    """What `run` would do now; nothing is computed and nothing is written."""
    before = [r for r in runs.newest_first(store) if r.recipe == recipe.name]
    found: dict[str, Planned] = {}
    digests: dict[str, str] = {}
    for entry in recipe.until(until):
        pending = [n for n in entry.inputs.values() if found[n].status == "run"]
        if pending:
            because = [f"input {n} will be made again" for n in dict.fromkeys(pending)]
            found[entry.name] = Planned("run", because)
            continue
        action = action_of(entry, {f: digests[n] for f, n in entry.inputs.items()})
        record = store.record(action.key)
        problem = _damage(store, record, entry) if record else None
        if record is not None and problem is None:
            digests[entry.name] = record.digest
            found[entry.name] = Planned("cached", [])
        else:
            because = [problem] if problem else _changes(store, before, entry, action)
            found[entry.name] = Planned("run", because)
    return found


def _damage(store: Store, record: Record, entry: Entry) -> str | None:
    try:
        store.artifact(record.digest, entry.kind)
    except CorruptArtifactError as error:
        return str(error)
    return None


def _changes(store: Store, before: list[Run], entry: Entry, action: Action) -> list[str]:
    """Which setting or input is not what it was when the stage last succeeded."""
    states = (run.stages.get(entry.name) for run in before)
    last = next((s for s in states if s and s.status in ("done", "cached")), None)
    record = store.record(last.key) if last and last.key else None
    if record is None:
        return ["it has not been made yet"]
    old, new = asdict(record.action), asdict(action)
    changes: list[str] = []
    for part, word in (("settings", ""), ("inputs", "input "), ("source", "source ")):
        for name in sorted({*old[part], *new[part]}):
            was, now = old[part].get(name), new[part].get(name)
            if was != now:
                shown = f": {_short(was)} -> {_short(now)}" if part == "settings" else " changed"
                changes.append(f"{word}{name}{shown}")
    if old["use"] != new["use"] or old["version"] != new["version"]:
        changes.append(f"stage {old['use']} v{old['version']} -> {new['use']} v{new['version']}")
    return changes or ["its result is no longer in the store"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
