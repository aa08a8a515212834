"""A recipe: a YAML file whose entries are stages, checked in full before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from lifecycle.errors import LifecycleError, RecipeError
from lifecycle.pipeline import registry, shipped
from lifecycle.pipeline.artifact import Artifact, with_article
from lifecycle.pipeline.document import KeyPath
from lifecycle.pipeline.layers import Layers, read_layers, stages_of
from lifecycle.pipeline.problems import Problems, explain
from lifecycle.pipeline.stage import Stage, kind_made, ref_kinds, references
from lifecycle.pipeline.suggest import did_you_mean

TOP_KEYS = ("name", "description", "extends", "stages")


@dataclass(frozen=True)
class Entry:
    """One artifact of a recipe: its name, the stage that makes it, and the stage's settings."""

    name: str
    use: str
    stage: Stage
    inputs: Mapping[str, str]
    """Names of the input artifacts by field."""
    kind: type[Artifact]
    """What it makes."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `entries` are in an order in which they can run."""

    name: str
    description: str
    source: str
    """The path or shipped name that was asked for."""
    entries: Mapping[str, Entry]

    def until(self, name: str | None) -> list[Entry]:
        """All entries, or `name` and what it needs.

        Raises:
            RecipeError: there is no such entry.
        """
        if name is None:
            return list(self.entries.values())
        self.require(name)
        wanted = {name}
        for entry in reversed(list(self.entries.values())):
            if entry.name in wanted:
                wanted.update(entry.inputs.values())
        return [entry for entry in self.entries.values() if entry.name in wanted]

    def require(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            RecipeError: there is none.
        """
        if name not in self.entries:
            known = ", ".join(self.entries)
            hint = did_you_mean(name, self.entries)
            raise RecipeError(f"no stage '{name}'{hint} (stages: {known})", file=self.source)
        return self.entries[name]

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out."""
        stages = {
            e.name: {"use": e.use, **e.stage.model_dump(mode="json")} for e in self.entries.values()
        }
        return {"name": self.name, "description": self.description, "stages": stages}


def load(source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a path, or the name of a shipped recipe.
        overrides: `stage.field=value` each, in order.

    Raises:
        RecipeError: whatever is wrong with it, all problems at once, each with its place.
    """
    path = shipped.find_recipe(source)
    layers = read_layers(path)
    for text in overrides:
        layers.override(text)
    problems = Problems(layers)
    _check_top(layers, problems)
    roots = (path.resolve().parent, Path.cwd())
    entries = _entries(layers, roots, problems)
    problems.check()
    entries = _with_kinds(entries)
    _check_references(entries, problems)
    problems.check()
    name = str(layers.data.get("name") or path.stem)
    ordered = {entry.name: entry for entry in _order(entries, problems)}
    problems.check()
    return Recipe(name, str(layers.data.get("description") or ""), source, ordered)


def _check_top(layers: Layers, problems: Problems) -> None:
    for key in layers.data:
        if key not in TOP_KEYS:
            hint = did_you_mean(key, TOP_KEYS)
            problems.add((key,), f"unknown key '{key}'{hint} (known: {', '.join(TOP_KEYS)})")
    for key in ("name", "description"):
        if not isinstance(layers.data.get(key, ""), str):
            problems.add((key,), "must be a string")
    if not layers.data.get("stages"):
        problems.add(("stages",), "a recipe needs at least one stage")


def _entries(layers: Layers, roots: tuple[Path, ...], problems: Problems) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, body in stages_of(layers.data).items():
        path: KeyPath = ("stages", name)
        if not name.replace("-", "_").isidentifier():
            problems.add(path, f"'{name}' is no name for an artifact: use letters, digits, - and _")
        elif not isinstance(body, dict) or not isinstance(
            cast("dict[str, Any]", body).get("use"), str
        ):
            problems.add(path, "must be a mapping with 'use', the name of a stage")
        else:
            settings = dict(cast("dict[str, Any]", body))
            use = settings.pop("use")
            if (entry := _entry(name, use, settings, roots, problems)) is not None:
                entries[name] = entry
    return entries


def _entry(
    name: str, use: str, settings: dict[str, Any], roots: tuple[Path, ...], problems: Problems
) -> Entry | None:
    path: KeyPath = ("stages", name)
    try:
        cls = registry.load(registry.STAGES, use, Stage, roots)
    except LifecycleError as error:
        problems.add((*path, "use"), str(error))
        return None
    if not hasattr(cls, "produces"):
        problems.add((*path, "use"), f"'{use}' does not say which kind of artifact it `produces`")
        return None
    try:
        stage = cls.model_validate(settings, context={"roots": roots})
    except ValidationError as error:
        for where, message in explain(error, cls, settings, roots):
            problems.add((*path, *where), message)
        return None
    inputs = {f: str(ref) for f, ref in references(stage).items()}
    return Entry(name, use, stage, inputs, cls.produces)


def _with_kinds(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries with the kinds that follow from their inputs."""

    def kind(name: str, passed: tuple[str, ...] = ()) -> type[Artifact]:
        entry = entries[name]
        field = type(entry.stage).keeps_kind_of
        origin = entry.inputs.get(field) if field else None
        # What is wrong with a reference is said elsewhere.
        if origin is None or origin not in entries or origin in passed:
            return entry.kind
        return kind_made(entry.stage, {str(field): kind(origin, (*passed, name))})

    return {name: replace(entry, kind=kind(name)) for name, entry in entries.items()}


def _check_references(entries: dict[str, Entry], problems: Problems) -> None:
    for entry in entries.values():
        for field, target in entry.inputs.items():
            path: KeyPath = ("stages", entry.name, *field.split("."))
            if target not in entries:
                hint = did_you_mean(target, entries)
                problems.add(path, f"no stage '{target}'{hint} (stages: {', '.join(entries)})")
                continue
            kinds = ref_kinds(type(entry.stage), field.split(".")[0])
            made = entries[target].kind
            if not issubclass(made, kinds):
                wanted = " or ".join(with_article(kind.kind) for kind in kinds)
                makes = with_article(made.kind)
                problems.add(path, f"'{target}' makes {makes}, this needs {wanted}")


def _order(entries: dict[str, Entry], problems: Problems) -> list[Entry]:
    """The entries so that inputs come first, otherwise as written."""
    ordered: dict[str, Entry] = {}
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in trail:
            circle = " -> ".join([*trail[trail.index(name) :], name])
            problems.add(("stages", name), f"the stages need each other in a circle: {circle}")
            return
        trail.append(name)
        for target in entries[name].inputs.values():
            visit(target)
            if problems.found:
                return
        trail.pop()
        ordered[name] = entries[name]

    for name in entries:
        visit(name)
        if problems.found:
            break
    return list(ordered.values())
