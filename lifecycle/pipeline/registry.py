"""Plug-ins: built-ins and other packages' come through the same entry-point groups."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lifecycle.errors import MissingExtraError, PluginError
from lifecycle.pipeline.suggest import did_you_mean

STAGES = "lifecycle.stages"
ADAPTERS = "lifecycle.adapters"
TARGETS = "lifecycle.targets"
ENGINES = "lifecycle.engines"
FORMATS = "lifecycle.formats"
ARCHITECTURES = "lifecycle.architectures"
GROUPS = (STAGES, ADAPTERS, TARGETS, ENGINES, FORMATS, ARCHITECTURES)

T = TypeVar("T")

_FROM_FILE = "_lifecycle_"
"""How the names of modules begin that were loaded from a `./file.py:Class`."""
_DIGEST = "__lifecycle_sha256__"

SETTINGS = ConfigDict(
    extra="forbid",
    frozen=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
    protected_namespaces=(),
)
"""How the settings of stages and plug-ins are read."""


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(
                f"two packages offer {group} '{entry.name}': {other.value} and {entry.value}; "
                "uninstall one of them"
            )
        found[entry.name] = entry
    return found


def names(group: str) -> list[str]:
    """The names of a group's plug-ins, sorted; nothing is imported."""
    return sorted(_entries(group))


def is_file_use(use: str) -> bool:
    """Whether `use` names a class in a file: `./file.py:Class`."""
    return ".py:" in use


def load(group: str, use: str, base: type[T], roots: Iterable[Path] = ()) -> type[T]:
    """The class that `use` names in a group, or in a file looked for below `roots`.

    Raises:
        PluginError: unknown name, failing import, or a class that is no `base`.
        MissingExtraError: its packages are not installed.
    """
    found = _load_file(use, roots) if is_file_use(use) else _load_entry(group, use)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"'{use}' is no {base.__name__}: {found!r}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(cast("Any", found).__abstractmethods__))
        raise PluginError(f"'{use}' does not define what a {base.__name__} needs: {missing}")
    return found


def load_function(group: str, name: str) -> Callable[..., Any]:
    """The function of that name in a group.

    Raises:
        PluginError: unknown name, failing import, or no function.
        MissingExtraError: its packages are not installed.
    """
    found = _load_entry(group, name)
    if not callable(found) or isinstance(found, type):
        raise PluginError(f"{group} '{name}' is no function: {found!r}")
    return cast("Callable[..., Any]", found)


def _load_entry(group: str, use: str) -> object:
    entry = _entries(group).get(use)
    if entry is None:
        if use.endswith(".py"):
            raise PluginError(f"'{use}' names a file but no class in it; write {use}:CLASS")
        known = names(group)
        what = group.removeprefix("lifecycle.").removesuffix("s")
        raise PluginError(
            f"unknown {what} '{use}'{did_you_mean(use, known)} (known: {', '.join(known)})"
        )
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        missing = MissingExtraError.explain(f"'{use}'", error)
        raise missing or PluginError(f"{group} '{use}' cannot be imported: {error}") from error
    except Exception as error:
        raise PluginError(f"{group} '{use}' cannot be imported: {error}") from error


def _load_file(use: str, roots: Iterable[Path]) -> object:
    name, _, attribute = use.rpartition(":")
    try:
        candidates = [(root / name).resolve() for root in (*roots, Path.cwd())]
        path = next((c for c in candidates if c.is_file()), None)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a circle
        raise PluginError(f"'{use}' cannot be looked for: {error}") from error
    if path is None:
        raise PluginError(f"'{use}': no such file: {candidates[0]}")
    try:
        module = _module(path)
    except (Exception, SystemExit) as error:
        raise PluginError(f"'{use}' cannot be imported: {_blame(error, path)}") from error
    if not hasattr(module, attribute):
        raise PluginError(f"{path} has no '{attribute}'{did_you_mean(attribute, vars(module))}")
    return getattr(module, attribute)


def _blame(error: BaseException, path: Path) -> str:
    """What went wrong in a user's file, and at which of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
    where = "" if line is None else f"line {line}: "
    return f"{where}{type(error).__name__}: {error}"


def _module(path: Path) -> ModuleType:
    """The module in a file, executed once for each content of the file."""
    code = path.read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    name = _FROM_FILE + hashlib.sha256(f"{path}\0{digest}".encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)[_DIGEST] = digest
    sys.modules[name] = module
    try:
        # What was hashed is what runs; the loader would read the file a second time.
        exec(loader.source_to_code(code, path), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def source_hash(cls: type) -> str | None:
    """SHA-256 of the code that a `./file.py:Class` was loaded from, whatever the file holds by
    now; None for installed classes."""
    if not cls.__module__.startswith(_FROM_FILE):
        return None
    return vars(sys.modules[cls.__module__])[_DIGEST]


def roots_of(info: ValidationInfo) -> tuple[Path, ...]:
    """The folders below which a recipe's relative paths are looked for."""
    context = cast("dict[str, Any]", info.context or {})
    return tuple(context.get("roots", ()))


class Plugin(BaseModel):
    """Settings whose class is picked by `use`: the base of adapters and targets.

    A field typed with a subclass that sets `group` takes `{use: name, …}` or just `name`.
    """

    model_config = SETTINGS

    group: ClassVar[str]
    """The entry-point group of the family."""
    use: str = ""
    """The plug-in's name in its group, or `./file.py:Class`."""

    @model_validator(mode="wrap")
    @classmethod
    def _pick(
        cls, value: Any, handler: ModelWrapValidatorHandler[Any], info: ValidationInfo
    ) -> Any:
        if isinstance(value, str):
            value = {"use": value}
        if not isinstance(value, Mapping):
            return handler(value)
        settings = dict(cast("Mapping[str, Any]", value))
        use = settings.get("use", "")
        if not use:
            if "group" in vars(cls):  # The family itself, which is no plug-in.
                raise ValueError(f"'use' is missing; it names one of {', '.join(names(cls.group))}")
            return handler(settings)
        roots = roots_of(info)
        try:
            picked = load(cls.group, str(use), cls, roots)
        except (PluginError, MissingExtraError) as error:
            raise ValueError(str(error)) from error
        if picked is cls:
            return handler(settings)
        return picked.model_validate(settings, context=info.context)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if cls.model_fields["use"].default:
            return handler(schema)
        branches: list[JsonSchemaValue] = [
            {"enum": names(cls.group)},
            {
                "type": "object",
                "required": ["use"],
                "properties": {"use": {"type": "string", "pattern": r"\.py:\w+$"}},
            },
        ]
        for name in names(cls.group):
            own = load(cls.group, name, cls).model_json_schema()
            own["properties"]["use"] = {"const": name}
            branches.append({**own, "required": ["use"]})
        return {"anyOf": branches}

    @model_serializer(mode="wrap")
    def _whole(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All fields of the picked class, whatever class the field was declared with."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return values | {"use": self.use}
