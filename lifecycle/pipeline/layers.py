"""The layers of a recipe: what it extends, the file itself, and the command line on top."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lifecycle.errors import RecipeError
from lifecycle.pipeline import document, shipped
from lifecycle.pipeline.document import Document, KeyPath
from lifecycle.pipeline.suggest import did_you_mean

COMMAND_LINE = "command line"


class Layers:
    """The merged data of a recipe, and where each value was written."""

    def __init__(self, main: Document, parents: Sequence[Document]) -> None:
        self.main = main
        self.documents = [*parents, main]
        self.overridden: list[KeyPath] = []
        self.data: dict[str, Any] = {}
        for doc in self.documents:
            self.data = _merge(self.data, doc.data)
        self.data.pop("extends", None)

    def place(self, path: KeyPath) -> tuple[str, int | None]:
        """The file and line where a value was written."""
        if any(path[: len(o)] == o for o in self.overridden):
            return COMMAND_LINE, None
        for doc in reversed(self.documents):
            if path in doc.lines:
                return doc.file, doc.lines[path]
        for doc in reversed(self.documents):
            if path[:2] in doc.lines:
                return doc.file, doc.line(path)
        return self.main.file, self.main.line(path)

    def override(self, text: str) -> None:
        """Apply `stage.field=value`."""
        target, equals, value = text.partition("=")
        keys = target.split(".")
        if not equals or not all(keys):
            raise RecipeError(
                f"'{text}' is no override; write stage.field=value, such as tuned.epochs=3"
            )
        stages: dict[str, Any] = self.data.setdefault("stages", {})
        if keys == ["name"]:
            self.data["name"] = value
            return
        if len(keys) < 2 and keys[0] in stages:
            raise RecipeError(
                f"'{text}': '{keys[0]}' is a whole stage; name one of its fields: "
                f"{keys[0]}.FIELD=VALUE"
            )
        if len(keys) < 2 or keys[0] not in stages:
            hint = did_you_mean(keys[0], stages)
            raise RecipeError(f"'{text}': no stage '{keys[0]}'{hint} (stages: {', '.join(stages)})")
        _assign(stages, keys, _value(value), text)
        self.overridden.append(("stages", *keys))


def _value(text: str) -> Any:
    """A value on the command line: a list, mapping or quoted string in YAML, or a plain scalar
    (so that `>= 0.5` is not taken for the beginning of a block)."""
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        return document.parse(text, COMMAND_LINE).data
    return document.scalar(text)


def stages_of(data: dict[str, Any]) -> dict[str, Any]:
    """The stages of a recipe as written, by name."""
    return dict(cast("dict[str, Any]", data.get("stages") or {}))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: stages by name, a stage's keys one by one."""
    merged = {**base, **over}
    stages = stages_of(base)
    for name, body in stages_of(over).items():
        both = isinstance(body, dict) and isinstance(stages.get(name), dict)
        stages[name] = {**stages[name], **body} if both else body
    merged["stages"] = copy.deepcopy(stages)
    return merged


def _assign(node: Any, keys: Sequence[str], value: Any, text: str) -> None:
    """Set a value deep inside; a plug-in's short form (`adapter: lora`) becomes a mapping."""
    for i, key in enumerate(keys[:-1]):
        child = _child(node, key, text)
        if isinstance(child, str) and i > 0:
            child = {"use": child}
        elif child is None:
            child = {}
        elif not isinstance(child, (dict, list)):
            raise RecipeError(f"'{text}': {'.'.join(keys[: i + 1])} is no mapping")
        if isinstance(node, list):
            cast("list[Any]", node)[int(key)] = child
        else:
            node[key] = child
        node = cast("Any", child)
    if isinstance(node, list):
        _child(node, keys[-1], text)
        cast("list[Any]", node)[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def _child(node: Any, key: str, text: str) -> Any:
    if isinstance(node, dict):
        return cast("dict[str, Any]", node).get(key)
    items = cast("list[Any]", node)
    if not key.isdecimal() or int(key) >= len(items):
        raise RecipeError(f"'{text}': '{key}' is no index of a list of {len(items)}")
    return items[int(key)]


def read_layers(path: Path) -> Layers:
    """Read a recipe file and the files it extends.

    Raises:
        RecipeError: a file is missing or no mapping, or an extended file extends another.
    """
    main = _mapping(document.read(path))
    extends: Any = main.data.get("extends") or []
    targets = cast("list[Any]", [extends] if isinstance(extends, str) else extends)
    if not isinstance(extends, (str, list)) or not all(isinstance(t, str) for t in targets):
        line = main.line(("extends",))
        raise RecipeError(
            "must be a path or a list of paths", file=path, line=line, where="extends"
        )
    parents: list[Document] = []
    for target in targets:
        found = shipped.find_fragment(target, path.resolve().parent)
        if found is None:
            line = main.line(("extends",))
            message = f"no such file: '{target}' (a path relative to this recipe)"
            raise RecipeError(message, file=path, line=line, where="extends")
        parent = _mapping(document.read(found))
        if parent.data.get("extends"):
            line = parent.line(("extends",))
            message = f"a file that {path.name} extends cannot itself extend another"
            raise RecipeError(message, file=found, line=line, where="extends")
        parents.append(parent)
    return Layers(main, parents)


def _mapping(doc: Document) -> Document:
    data = doc.data
    if not isinstance(data, dict):
        raise RecipeError("must be a mapping with the key 'stages'", file=doc.file)
    stages = cast("dict[str, Any]", data).get("stages", {})
    if stages is not None and not isinstance(stages, dict):
        message = "must be a mapping from names to stages"
        raise RecipeError(message, file=doc.file, line=doc.line(("stages",)), where="stages")
    return doc
