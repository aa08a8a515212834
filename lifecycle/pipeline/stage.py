"""The one abstraction: a stage turns artifacts into one new artifact."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    Protocol,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

from pydantic import (
    BaseModel,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
)
from pydantic.functional_validators import AfterValidator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from lifecycle.pipeline.artifact import MANIFEST, Artifact, Metrics
from lifecycle.pipeline.files import link_tree
from lifecycle.pipeline.registry import SETTINGS, roots_of
from lifecycle.pipeline.suggest import did_you_mean

K = TypeVar("K", bound=Artifact)


class Ref(str, Generic[K]):
    """The name of an artifact in the recipe, of kind `K` (or one of a union of kinds)."""

    __slots__ = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(min_length=1)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", "description": "The name of a stage of this recipe."}


@dataclass(frozen=True, slots=True)
class Marker:
    """Says how a field enters the key of a stage; attached with `typing.Annotated`."""

    role: str


RUNTIME = Marker("runtime")
"""Where or how fast the stage runs; never part of its key. `Annotated[int, RUNTIME]`."""

_SOURCE = Marker("source")


def _resolve(path: Path, info: ValidationInfo) -> Path:
    """The path itself if absolute, else the first that exists beside the recipe or below the
    current directory."""
    roots = roots_of(info) or (Path.cwd(),)
    try:
        candidates = list(dict.fromkeys((root / path.expanduser()).resolve() for root in roots))
        found = next((c for c in candidates if c.is_file() or c.is_dir()), None)
    except (OSError, RuntimeError) as error:  # too long, not permitted, no such user, a circle
        raise ValueError(f"cannot be looked for: {error}") from error
    if found is not None:
        return found
    tried = " and ".join(str(c) for c in candidates)
    near = [p.name for c in candidates if c.parent.is_dir() for p in c.parent.iterdir()]
    raise ValueError(f"no such file or folder: looked for {tried}{did_you_mean(path.name, near)}")


SourcePath = Annotated[Path, AfterValidator(_resolve), _SOURCE]
"""A file or folder that a stage reads from outside the store: it must exist, and the hashes
of its bytes, not its place, are part of the key. A relative path is looked for beside the
recipe, then below the current directory."""


class Progress(Protocol):
    """Where a stage says how far it is. Calls are cheap; drawing is throttled.

    Every call is also a safe point: it raises `InterruptedRun` once the run is asked to stop.
    """

    def update(self, done: float, total: float | None = None, **metrics: float) -> None:
        """Say that `done` of `total` units are finished, with the metrics of this moment."""
        ...

    def phase(self, name: str) -> None:
        """Say what the next updates count."""
        ...

    def log(self, message: str) -> None:
        """Show one line to the user and keep it with the run."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop; save to `scratch`, then call `update`."""
        ...


class Builder(Protocol):
    """Takes the artifact of a stage from the store, or makes it; see `Context.build`."""

    def __call__(
        self, name: str, use: str, stage: Stage, inputs: Mapping[str, Artifact]
    ) -> Artifact: ...


@dataclass(frozen=True)
class Context:
    """What a running stage is given."""

    name: str
    """The name of the artifact in the recipe."""
    inputs: Mapping[str, Artifact]
    """The verified input artifact of each `Ref` field that is set; of a list of references,
    `field.0`, `field.1`, …"""
    out: Path
    """An empty directory; it becomes the artifact when `run` returns."""
    scratch: Path
    """Survives a failure or a kill, so that the next attempt resumes; removed on success."""
    progress: Progress
    by_name: Mapping[str, Artifact]
    """The same artifacts by their names in the recipe."""
    builder: Builder
    """What `build` calls."""

    def input(self, ref: Ref[K]) -> K:
        """The artifact that a `Ref` field names, typed as its kind."""
        return cast(K, self.by_name[ref])

    def link(self, source: Path, target: str = ".") -> None:
        """Put a file or a folder's files below `out` without copying where the file system
        allows; the files must not be changed afterwards."""
        link_tree(source, self.out / target, skip=source / MANIFEST)

    def build(
        self, name: str, use: str, stage: Stage, made: Mapping[str, Artifact] | None = None
    ) -> Artifact:
        """The artifact of another stage, from the store or made now, as if the recipe had it.

        It has the key that a recipe's entry with these settings has: what is there already, from
        another recipe or from an attempt that was interrupted, is not made again.

        Args:
            name: what the user sees of it.
            use: the name of the stage among the plug-ins, such as `quantize`.
            stage: its settings; its references name inputs of this stage, or keys of `made`.
            made: artifacts that `build` gave before, under names that no recipe can have,
                such as `the candidate`.

        Raises:
            LifecycleError: what the stage raises.
        """
        return self.builder(name, use, stage, {**(made or {}), **self.by_name})


class Stage(BaseModel, ABC):
    """Settings are fields, inputs are `Ref` fields, `run` writes one artifact.

    Import heavy libraries inside `run`: the class itself is loaded to check recipes.
    """

    model_config = SETTINGS

    produces: ClassVar[type[Artifact]]
    """The kind of the artifact that `run` writes."""
    keeps_kind_of: ClassVar[str | None] = None
    """A reference: what `run` writes is of that input's kind, which is `produces` or a special case
    of it."""
    version: ClassVar[int] = 1
    """Raise it when the same settings and inputs now give a different output."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name, info in cls.model_fields.items():
            if _hides_reference(info.annotation):
                raise TypeError(
                    f"{cls.__name__}.{name}: a reference in {info.annotation} would be no input of "
                    "the stage; an input is a field of its own: Ref[Kind], or list[Ref[Kind]]"
                )

    @abstractmethod
    def run(self, ctx: Context) -> Metrics:
        """Write the artifact's files below `ctx.out`; return what was measured."""

    def fingerprint(self) -> Mapping[str, Any]:
        """What the stage reads besides its settings, inputs and `SourcePath` fields, as hashes
        or versions; part of its key. Must be quick."""
        return {}


def parts_of(annotation: Any) -> Iterator[Any]:
    """The annotation and everything inside its unions, lists and `Annotated`."""
    yield annotation
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple):
        for part in get_args(annotation):
            yield from parts_of(part)


def _hides_reference(annotation: Any, top: bool = True) -> bool:
    """Whether references stand where `references` does not look: in dicts, in lists of lists,
    in models inside the stage."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Ref:
        return False
    if origin in (Annotated, Union, types.UnionType):
        return any(_hides_reference(part, top) for part in parts)
    if origin in (list, tuple) and top:
        return any(_hides_reference(part, top=False) for part in parts)
    return any(get_origin(part) is Ref for part in _everything(annotation, set()))


def _everything(annotation: Any, seen: set[type]) -> Iterator[Any]:
    """All that an annotation is made of, the fields of models included."""
    yield annotation
    for part in get_args(annotation):
        yield from _everything(part, seen)
    if isinstance(annotation, type) and annotation not in seen:
        seen.add(annotation)
        if issubclass(annotation, BaseModel):
            for field in annotation.model_fields.values():
                yield from _everything(field.annotation, seen)


def field_markers(stage: type[Stage], field: str) -> set[str]:
    """The roles of the markers on a field: 'runtime', 'source'."""
    info = stage.model_fields[field]
    found = [*info.metadata, *parts_of(info.annotation)]
    return {item.role for item in found if isinstance(item, Marker)}


def ref_kinds(stage: type[Stage], field: str) -> tuple[type[Artifact], ...]:
    """The kinds that a `Ref` field takes; empty when the field is no reference."""
    for part in parts_of(stage.model_fields[field].annotation):
        if get_origin(part) is Ref:
            kinds = get_args(part)[0]
            if get_origin(kinds) in (Union, types.UnionType):
                return cast("tuple[type[Artifact], ...]", get_args(kinds))
            return (kinds,)
    return ()


def kind_made(stage: Stage, given: Mapping[str, type[Artifact]]) -> type[Artifact]:
    """What a stage makes of inputs of these kinds, by field."""
    kept = given.get(stage.keeps_kind_of or "")
    return kept if kept and issubclass(kept, stage.produces) else stage.produces


def references(stage: Stage) -> dict[str, Ref[Any]]:
    """The references of a stage that are set, by field (`field.0` … for lists)."""
    found: dict[str, Ref[Any]] = {}
    for field in type(stage).model_fields:
        if not ref_kinds(type(stage), field):
            continue
        value = getattr(stage, field)
        if isinstance(value, Ref):
            found[field] = value
        elif isinstance(value, (list, tuple)):
            found |= {f"{field}.{i}": ref for i, ref in enumerate(cast("list[Ref[Any]]", value))}
    return found
