"""The recipes and fragments that come with the project: in the checkout or inside the wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lifecycle.errors import RecipeError
from lifecycle.pipeline.suggest import did_you_mean


@cache
def root() -> Path:
    """The folder that holds `recipes/` and `configs/`."""
    package = Path(__file__).resolve().parent.parent
    bundled = package / "_bundled"
    return bundled if bundled.is_dir() else package.parent


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted((root() / "recipes").glob("*.yaml"))}


def find_recipe(source: str) -> Path:
    """The file that a path or the name of a shipped recipe means; a file wins over a name.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(source)
    try:
        if path.exists() and not path.is_dir():
            return path
        if path.is_dir():
            raise RecipeError("is a folder, not a recipe", file=source)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", file=source) from error
    known = recipes()
    if source in known:
        return known[source]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError(f"no such file{did_you_mean(path.name, near)}", file=source)
    hint = did_you_mean(source, known)
    raise RecipeError(f"no recipe '{source}'{hint} (a path to a YAML file, or {', '.join(known)})")


def find_fragment(target: str, beside: Path) -> Path | None:
    """The file that `extends` means: beside the recipe, or, for a recipe that was copied out,
    the shipped one of the same path below `configs/`."""
    path = beside / target
    if path.is_file():
        return path
    parts = Path(target).parts
    if "configs" in parts:
        path = root().joinpath(*parts[parts.index("configs") :])
        if path.is_file() and ".." not in parts[parts.index("configs") :]:
            return path
    return None
