"""Every YAML that ships is read by the code that users run."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from lifecycle.commands.schema import recipe_schema
from lifecycle.pipeline.document import parse, read
from lifecycle.pipeline.recipe import load

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
FRAGMENTS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_none_is_overlooked() -> None:
    found = {p for folder in ("recipes", "configs") for p in (ROOT / folder).rglob("*.y*ml")}
    assert found == {*RECIPES, *FRAGMENTS}
    assert (len(RECIPES), len(FRAGMENTS)) == (3, 3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_valid_and_opens_with_its_command(path: Path) -> None:
    recipe = load(str(path))
    assert recipe.name == path.stem
    assert recipe.description
    assert path.read_text().splitlines()[0] == f"# lifecycle run {path.stem}"


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda p: p.name)
def test_every_fragment_is_used_by_a_recipe(path: Path) -> None:
    extended = [(p.parent / t).resolve() for p in RECIPES for t in _targets(p)]
    assert path in extended


def _targets(path: Path) -> list[str]:
    target = read(path).data.get("extends", [])
    return [target] if isinstance(target, str) else target


@pytest.mark.parametrize("path", [*RECIPES, *FRAGMENTS], ids=lambda p: p.name)
def test_every_file_satisfies_the_schema(path: Path) -> None:
    # Without `use` a fragment's or a completed stage's settings cannot be told apart.
    jsonschema.Draft202012Validator(recipe_schema()).validate(
        {k: v for k, v in read(path).data.items() if k != "stages"}
        | {"stages": {n: s for n, s in read(path).data["stages"].items() if "use" in s}}
    )


@pytest.mark.parametrize(
    "text",
    [
        "stages: {a: {use: finetun}}",
        "stages: {a: {use: finetune, modell: b}}",
        "stages: {a: {use: finetune, model: b, data: c, epochs: many}}",
        "stage: {}",
    ],
)
def test_the_schema_refuses_what_the_recipe_would(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(recipe_schema()).validate(parse(text, "f").data)
