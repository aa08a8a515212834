"""Reading YAML 1.2 with the line of every value, and nothing that YAML can do but should not.

`no` and `on` are strings, `1e-4` is a number, a duplicate key is an error, tags, recursive
aliases and aliases that multiply into millions of values are refused. PyYAML parses; its YAML 1.1 idea of scalars is not used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from lifecycle.errors import RecipeError

KeyPath = tuple[str | int, ...]

MOST_VALUES = 100_000
LONGEST_NUMBER = 1000
"""Characters; what is longer is text, as Python refuses to spell it out."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + t: float("inf") for sign in ("", "+") for t in (".inf", ".Inf", ".INF")},
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}
"""What a value without a tag of its own is given."""


def scalar(text: str) -> Any:
    """A plain scalar by the YAML 1.2 core schema."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if len(text) > LONGEST_NUMBER:
        return text
    if _INT.fullmatch(text):
        digits = text.lstrip("+-")
        return int(text, 0) if digits[:2] in ("0o", "0x") else int(text, 10)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Loader(yaml.SafeLoader):
    """Resolves no scalar by itself, so that the core schema above decides."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML file: plain data, and the line (from 1) of every value by its path."""

    data: Any
    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict[KeyPath, int])

    def line(self, path: KeyPath) -> int | None:
        """The line of a value, or of the nearest value around it that is written down."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def parse(text: str, file: str) -> Document:
    """Parse one YAML document.

    Raises:
        RecipeError: bad syntax, a duplicate key, a tag or a recursive alias; names the line.
    """
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader=_Loader))  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "cannot be parsed"
        line = mark.line + 1 if mark else None
        raise RecipeError(f"not YAML: {what}", file=file, line=line) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not YAML: {error}", file=file) from error
    lines: dict[KeyPath, int] = {}
    data = None if node is None else _build(node, (), file, lines, frozenset())
    return Document(data, file, lines)


def read(path: Path) -> Document:
    """Parse a YAML file.

    Raises:
        RecipeError: it is missing, no UTF-8 text or no YAML.
    """
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError:
        raise RecipeError("no such file", file=path) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start})", file=path) from error
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", file=path) from error


def _build(
    node: yaml.Node, path: KeyPath, file: str, lines: dict[KeyPath, int], above: frozenset[int]
) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    where = ".".join(map(str, path))
    if id(node) in above:
        raise RecipeError("an alias that contains itself", file=file, line=line, where=where)
    if len(lines) > MOST_VALUES:
        raise RecipeError(f"more than {MOST_VALUES:,} values", file=file, line=lines[path[:1]])
    if node.tag not in _PLAIN_TAGS:
        raise RecipeError(f"tag {node.tag} is not allowed", file=file, line=line, where=where)
    above = above | {id(node)}
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_build(n, (*path, i), file, lines, above) for i, n in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError("a key must be a string", file=file, line=key_line, where=where)
        key = str(key_node.value)
        if key in result:
            first = lines[(*path, key)]
            message = f"duplicate key '{key}' (first on line {first})"
            raise RecipeError(message, file=file, line=key_line, where=where)
        lines[(*path, key)] = key_line
        result[key] = _build(value_node, (*path, key), file, lines, above)
    return result
