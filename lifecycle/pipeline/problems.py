"""What is wrong with a recipe: all of it at once, each fault with its place and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from lifecycle.errors import RecipeError
from lifecycle.pipeline import registry
from lifecycle.pipeline.document import KeyPath
from lifecycle.pipeline.layers import Layers
from lifecycle.pipeline.stage import Stage, parts_of
from lifecycle.pipeline.suggest import did_you_mean


class Problems:
    """Collects what is wrong, so that one error shows all of it."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.found: list[RecipeError] = []

    def add(self, path: KeyPath, message: str) -> None:
        """Note a fault of the value at `path`."""
        file, line = self.layers.place(path)
        where = ".".join(map(str, path))
        self.found.append(RecipeError(message, file=file, line=line, where=where))

    def check(self) -> None:
        """Raise a `RecipeError` that shows all faults, if there are any."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            lines = "\n".join(f"  {error}" for error in self.found)
            raise RecipeError(f"{len(self.found)} problems in this recipe:\n{lines}")


def explain(
    error: ValidationError, cls: type[Stage], settings: dict[str, Any], roots: tuple[Path, ...]
) -> Iterator[tuple[KeyPath, str]]:
    """Each fault of the settings: where, and what a user can do about it."""
    for item in error.errors(include_url=False):
        where = _written_path(item["loc"], settings)
        kind, key = item["type"], str(item["loc"][-1]) if item["loc"] else ""
        if kind == "extra_forbidden":
            known = _known_keys(cls, item["loc"], settings, roots)
            more = f" (known: {', '.join(known)})" if known else ""
            yield where, f"unknown key '{key}'{did_you_mean(key, known)}{more}"
        elif kind == "missing":
            yield where, f"'{key}' is missing"
        elif kind == "literal_error":
            expected = str(item.get("ctx", {}).get("expected", ""))
            hint = did_you_mean(str(item["input"]), re.findall(r"'([^']*)'", expected))
            yield where, f"{_shown(item['input'])} is none of {expected}{hint}"
        elif kind == "value_error":
            yield where, str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
        elif kind in ("model_type", "dict_type"):
            yield where, f"expected a mapping, not {_shown(item['input'])}"
        else:
            message = item["msg"][:1].lower() + item["msg"][1:]
            yield where, f"{message}, not {_shown(item['input'])}"


def _known_keys(
    cls: type[BaseModel],
    loc: tuple[str | int, ...],
    settings: dict[str, Any],
    roots: tuple[Path, ...],
) -> list[str]:
    """The keys that the mapping around the last part of `loc` takes; none if it is unclear."""
    node: Any = settings
    for part in loc[:-1]:
        field = cls.model_fields.get(str(part))
        parts = parts_of(field.annotation) if field else ()
        model = next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)
        if model is None:
            return []
        node = node[part]
        if issubclass(model, registry.Plugin):
            model = registry.load(model.group, str(node["use"]), model, roots)
        cls = model
    return list(cls.model_fields)


def _written_path(loc: tuple[str | int, ...], settings: dict[str, Any]) -> KeyPath:
    """`loc` without the parts that name branches of a union rather than keys of the file."""
    node: Any = settings
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(node, dict) and part in node:
            node = cast("dict[str | int, Any]", node)[part]
        elif isinstance(node, list) and part in range(len(cast("list[Any]", node))):
            node = cast("list[Any]", node)[int(part)]
        elif i < len(loc) - 1:
            continue
        elif not isinstance(node, dict):
            break
        path.append(part)
    return tuple(path)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
