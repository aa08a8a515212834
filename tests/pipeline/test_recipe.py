from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle.errors import RecipeError
from lifecycle.pipeline.recipe import load
from tests.workshop import TOYS, Workshop

GOOD = """
  total: {use: toy:Add, left: a, others: [b]}
  a: {use: toy:Const, value: 2}
  b: {use: toy:Const}
"""


def refused(workshop: Workshop, stages: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        workshop.load(stages, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_inputs_come_first(workshop: Workshop) -> None:
    assert list(workshop.load(GOOD).entries) == ["a", "b", "total"]


def test_until_takes_what_is_needed(workshop: Workshop) -> None:
    stages = GOOD + "  c: {use: toy:Add, left: total}\n  d: {use: toy:Const}\n"
    assert [e.name for e in workshop.load(stages).until("total")] == ["a", "b", "total"]


@pytest.mark.parametrize(
    ("stages", "line", "words"),
    [
        ("  a: {use: chekpoint}\n", 3, "unknown stage 'chekpoint'; did you mean 'checkpoint'?"),
        ("  a: {use: toy:Cons}\n", 3, "has no 'Cons'; did you mean 'Const'?"),
        ("  a: {use: toy:Const, valeu: 3}\n", 3, "unknown key 'valeu'; did you mean 'value'?"),
        ("  a:\n    use: toy:Const\n    rate: fast\n", 5, "not 'fast'"),
        ("  a: {use: toy:Add}\n", 3, "'left' is missing"),
        ("  a: {use: toy:Const}\n  c: {use: toy:Add, left: aa}\n", 4, "did you mean 'a'?"),
        ("  a: {use: toy:Const}\n  c: {use: toy:Read, text: a}\n", 4,
         "'a' makes a number, this needs a text or a tokenizer"),
        ("  a: {use: toy:Add, left: b}\n  b: {use: toy:Add, left: a}\n", 3, "a -> b -> a"),
        ("  a: {use: toy:Add, left: a}\n", 3, "a -> a"),
        ("  a: {use: toy:FromFile, path: nowhere.txt}\n", 3, "no such file or folder"),
        ("  a: [1]\n", 3, "must be a mapping with 'use'"),
        ("  a: {use: toy:Const, unit: metre}\n", 3, "'metre' is none of 'meter' or 'foot'"),
        ("  a: {use: toy:Const, unit: metre}\n", 3, "did you mean 'meter'?"),
        ("  a: {value: 3}\n", 3, "must be a mapping with 'use'"),
        ("  'a b': {use: toy:Const}\n", 3, "no name for an artifact"),
        ("  a: {use: ./gone.py:Stage}\n", 3, "no such file"),
        ("  a: {use: toy:Number}\n", 3, "is no Stage"),
        ("  a: {use: toy:Const, rate: .nan}\n", 3, "should be a finite number"),
        ("  a:\n    use: toy:Shaped\n    shape:\n      use: toy:Square\n      sid: 2\n", 7,
         "unknown key 'sid'; did you mean 'side'? (known: use, side)"),
        ("  a:\n    use: toy:Shaped\n    corner:\n      hight: 2\n", 6, "did you mean 'height'?"),
        ("  a: {use: toy:Shaped, corner: 8}\n", 3, "expected a mapping, not 8"),
        ("  a:\n    use: toy:Shaped\n    size: [1]\n", 5, "is missing"),
        ("  a: {use: toy:FromFile, path: ~no-such-user/x}\n", 3, "cannot be looked for"),
        ("  a: {use: toy:FromFile, path: " + "x" * 5000 + "}\n", 3, "File name too long"),
        ('  a: {use: "toy\\0.py:Const"}\n', 3, "cannot be looked for"),
        ("  a: {use: ./file.py}\n", 3, "write ./file.py:CLASS"),
        ("  a: {use: toy:Unfinished}\n", 3, "does not define what a Stage needs: run"),
        ("  a: {use: toy:Unkind}\n", 3, "which kind of artifact it `produces`"),
    ],
)  # fmt: skip
def test_every_fault_names_its_place_and_the_way_out(
    workshop: Workshop, stages: str, line: int, words: str
) -> None:
    message = refused(workshop, stages)
    assert words in message
    assert f"recipe.yaml:{line}: stages." in message


def test_all_faults_are_shown_at_once(workshop: Workshop) -> None:
    message = refused(workshop, "  a: {use: toy:Const, x: 1, y: 2}\n  b: {use: nothing}\n")
    assert "3 problems" in message
    assert message.count("recipe.yaml:") == 3


def test_missing_file_names_a_near_one(workshop: Workshop) -> None:
    (workshop.root / "number.txt").write_text("3")
    assert "did you mean 'number.txt'?" in refused(
        workshop, "  a: {use: toy:FromFile, path: numbr.txt}\n"
    )


def test_top_level_keys_are_checked(workshop: Workshop) -> None:
    path = workshop.write("  a: {use: toy:Const}\n", head="nam: toy\n")
    with pytest.raises(RecipeError, match="unknown key 'nam'; did you mean 'name'"):
        load(str(path))


@pytest.mark.parametrize("text", ["", "- a\n", "stages:\n", "stages: [a]\n", "name: x\n"])
def test_a_recipe_without_stages(workshop: Workshop, text: str) -> None:
    path = workshop.root / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="stage"):
        load(str(path))


def test_unknown_recipe_names_the_near_one() -> None:
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load("quikstart")
    with pytest.raises(RecipeError, match="no such file"):
        load("nowhere/recipe.yaml")
    with pytest.raises(RecipeError, match="File name too long"):
        load("x" * 5000)


def test_overrides(workshop: Workshop) -> None:
    assert workshop.load(GOOD, "name=>= x").name == ">= x"
    recipe = workshop.load(GOOD, "a.value=7", "total.others=[a, b]", "total.others.1=a", "name=new")
    assert recipe.name == "new"
    assert recipe.entries["a"].stage.model_dump()["value"] == 7
    assert recipe.entries["total"].inputs == {"left": "a", "others.0": "a", "others.1": "a"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a.value", "is no override"),
        ("=3", "is no override"),
        ("aa.value=3", "no stage 'aa'; did you mean 'a'?"),
        ("a=3", "'a' is a whole stage; name one of its fields: a.FIELD=VALUE"),
        ("a.vale=3", "command line: stages.a.vale: unknown key 'vale'; did you mean 'value'?"),
        ("a.value=x", "command line: stages.a.value: "),
        ("a.value=[", "command line:"),
        ("total.others.5=a", "no index of a list of 1"),
        ("total.others.²=a", "no index of a list of 1"),
        ("a.value.deep=1", "is no mapping"),
    ],
)
def test_bad_overrides(workshop: Workshop, override: str, words: str) -> None:
    assert words in refused(workshop, GOOD, override)


def test_extends_merges_stages_key_by_key(workshop: Workshop) -> None:
    parent = f"stages:\n  a: {{use: '{TOYS}:Const', value: 5, rate: 0.1}}\n"
    (workshop.root / "parent.yaml").write_text(parent)
    path = workshop.write("  a: {value: 6}\n", head="extends: parent.yaml\n")
    stage = load(str(path)).entries["a"].stage.model_dump()
    assert (stage["value"], stage["rate"]) == (6, 0.1)


def test_a_fault_in_an_extended_file_names_that_file(workshop: Workshop) -> None:
    (workshop.root / "parent.yaml").write_text(f"stages:\n  a: {{use: '{TOYS}:Const', x: 5}}\n")
    path = workshop.write("  a: {value: 6}\n", head="extends: [parent.yaml]\n")
    with pytest.raises(RecipeError, match=r"parent\.yaml:2: stages\.a\.x: unknown key 'x'"):
        load(str(path))


def test_extends_is_one_level(workshop: Workshop) -> None:
    (workshop.root / "parent.yaml").write_text("extends: other.yaml\nstages: {}\n")
    path = workshop.write("  a: {use: toy:Const}\n", head="extends: parent.yaml\n")
    with pytest.raises(RecipeError, match=r"parent\.yaml:1: extends: .* cannot itself extend"):
        load(str(path))
    path = workshop.write("  a: {use: toy:Const}\n", head="extends: gone.yaml\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1: extends: no such file: 'gone\.yaml'"):
        load(str(path))


def test_paths_are_found_beside_the_recipe(workshop: Workshop, monkeypatch, tmp_path: Path) -> None:
    (workshop.root / "n.txt").write_text("4")
    recipe = workshop.load("  a: {use: toy:FromFile, path: n.txt}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = workshop.load("  a: {use: toy:FromFile, path: n.txt}\n")
    assert again.entries["a"].stage == recipe.entries["a"].stage


@settings(max_examples=50)
@given(
    edges=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12),
)
def test_any_graph_is_ordered_or_a_circle_is_named(edges, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("graph")
    needs: dict[int, list[int]] = {}
    for a, b in edges:
        needs.setdefault(a, []).append(b)
    lines = ["stages:"]
    for node in range(7):
        if others := needs.get(node):
            refs = ", ".join(f"n{o}" for o in others)
            lines.append(f"  n{node}: {{use: '{TOYS}:Add', left: n{others[0]}, others: [{refs}]}}")
        else:
            lines.append(f"  n{node}: {{use: '{TOYS}:Const'}}")
    path = root / "r.yaml"
    path.write_text("\n".join(lines))
    try:
        order = list(load(str(path)).entries)
    except RecipeError as error:
        circle = str(error).rpartition(": ")[2].split(" -> ")
        assert circle[0] == circle[-1]
        for a, b in pairwise(circle):
            assert int(b[1:]) in needs[int(a[1:])]
    else:
        for a, b in edges:
            assert order.index(f"n{b}") < order.index(f"n{a}")
