"""`lifecycle schema`: the recipe language as JSON Schema, for editors."""

from __future__ import annotations

import json
from typing import Any

from lifecycle.commands.output import Parser, say
from lifecycle.commands.stages import installed
from lifecycle.pipeline import registry
from lifecycle.pipeline.recipe import TOP_KEYS
from lifecycle.pipeline.stage import Stage


def main(argv: list[str]) -> int:
    """Print the schema; every installed stage is in it."""
    parser = Parser(
        prog="lifecycle schema",
        description="Print the JSON schema of recipes. In an editor with the YAML language "
        "server, save it and put `# yaml-language-server: $schema=FILE` on a recipe's first line.",
    )
    parser.add_argument("--json", action="store_true", help="on one line")
    args = parser.parse_args(argv)
    say(json.dumps(recipe_schema(), indent=None if args.json else 2))
    return 0


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, with one branch per installed stage."""
    definitions: dict[str, Any] = {}
    branches: list[dict[str, Any]] = []
    known = registry.names(registry.STAGES)
    for use, cls in installed():
        reference = {"$ref": f"#/$defs/{use}"}
        definitions[use] = stage_schema(use, cls, definitions)
        condition = {"properties": {"use": {"const": use}}}
        branches.append({"if": condition, "then": reference})
    stage = {
        "type": "object",
        "required": ["use"],
        "properties": {"use": {"anyOf": [{"enum": known}, {"pattern": r"\.py:\w+$"}]}},
        "allOf": branches,
    }
    text = {"type": "string"}
    properties = {
        "name": text,
        "description": text,
        "extends": {"anyOf": [text, {"type": "array", "items": text}]},
        "stages": {"type": "object", "additionalProperties": {"$ref": "#/$defs/stage"}},
    }
    assert tuple(properties) == TOP_KEYS
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A lifecycle recipe",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": {"stage": stage, **definitions},
    }


def stage_schema(use: str, cls: type[Stage], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one stage's settings; required ones may come from an extended file."""
    schema = cls.model_json_schema(ref_template=f"#/$defs/{use}.{{model}}")
    for name, definition in schema.pop("$defs", {}).items():
        definitions[f"{use}.{name}"] = definition
    schema["properties"]["use"] = {"const": use}
    schema.pop("required", None)
    return schema
