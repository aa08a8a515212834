"""`lifecycle stages`: what a recipe can be made of."""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lifecycle.commands.output import Parser, emit, say, table
from lifecycle.errors import LifecycleError
from lifecycle.pipeline import registry
from lifecycle.pipeline.artifact import with_article
from lifecycle.pipeline.registry import Plugin
from lifecycle.pipeline.stage import Ref, Stage, field_markers


def main(argv: list[str]) -> int:
    """List all stages, or the settings of one."""
    parser = Parser(prog="lifecycle stages", description="The stages that recipes are made of.")
    parser.add_argument("name", nargs="?", help="show the settings of this stage")
    parser.add_json()
    args = parser.parse_args(argv)
    if args.name is None:
        found = dict(installed())
        if args.json:
            emit({"stages": {name: _about(cls) for name, cls in found.items()}})
        else:
            rows = [(name, cls.produces.kind, _first_line(cls)) for name, cls in found.items()]
            table(("stage", "makes", "what it does"), rows)
        return 0
    cls = _load(args.name)
    if args.json:
        emit({"name": args.name, **_about(cls), "settings": describe(cls)})
        return 0
    say(f"{args.name} (makes {with_article(cls.produces.kind)})\n\n{inspect.getdoc(cls)}")
    rows = [
        (s["name"], s["type"], "required" if s["required"] else default(s["default"]), s["doc"])
        for s in describe(cls)
    ]
    table(("setting", "type", "default", "meaning"), rows)
    return 0


def installed() -> Iterator[tuple[str, type[Stage]]]:
    """Every installed stage; for one that cannot be loaded, a warning."""
    for name in registry.names(registry.STAGES):
        try:
            yield name, _load(name)
        except LifecycleError as error:
            sys.stderr.write(f"warning: stage '{name}' is left out: {error}\n")


def _load(name: str) -> type[Stage]:
    return registry.load(registry.STAGES, name, Stage)


def _about(cls: type[Stage]) -> dict[str, Any]:
    return {"makes": cls.produces.kind, "version": cls.version, "doc": inspect.getdoc(cls)}


def _first_line(cls: type[Stage]) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def default(value: Any) -> str:
    """The default of a setting as a recipe spells it; empty for null."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False).replace('"', "")


def describe(cls: type[Stage]) -> list[dict[str, Any]]:
    """The settings of a stage: name, type, default, documentation."""
    return [_describe_field(cls, name, info) for name, info in cls.model_fields.items()]


def type_name(annotation: Any) -> str:
    """A type in the words of a recipe: `name of an hf-model`, `'cosine' | 'linear'`, `path`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Ref:
        kinds = get_args(args[0]) or args
        return "name of " + " or ".join(with_article(kind.kind) for kind in kinds)
    if origin is Annotated:
        return type_name(args[0])
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in args if a is not type(None))
    if origin is Literal:
        return " | ".join(repr(a) for a in args)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if origin is not None:
        return "mapping"
    if annotation is Any:
        return "any"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__.lower() if issubclass(annotation, Plugin) else "mapping"
    return _WORDS.get(annotation) or str(annotation.__name__).lower()


_WORDS: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true | false"}


def _describe_field(cls: type[Stage], name: str, info: FieldInfo) -> dict[str, Any]:
    default: Any = None
    if not info.is_required():
        default = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json", exclude_none=True) or None
    return {
        "name": name,
        "type": type_name(info.annotation),
        "required": info.is_required(),
        "default": default,
        "doc": (info.description or "").replace("\n", " "),
        "in_key": "runtime" not in field_markers(cls, name),
    }
