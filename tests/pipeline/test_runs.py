from __future__ import annotations

import json
import shutil
import time

import pytest

from lifecycle.errors import RecipeError, StoreError
from lifecycle.pipeline import runs
from tests.workshop import Workshop

ONE = "  a: {use: toy:Const}\n"


def test_runs_are_found_by_id_beginning_and_recipe(workshop: Workshop) -> None:
    first, second = workshop.run(ONE), workshop.run(ONE, "a.value=2")
    store = workshop.store
    assert {r.run for r in runs.newest_first(store)} == {first.run, second.run}
    assert runs.find(store, first.run).run == first.run
    newest = next(runs.newest_first(store)).run
    assert runs.find(store, "toy").run == newest
    with pytest.raises(RecipeError, match="begins the names of several runs"):
        runs.find(store, first.run[:4])
    with pytest.raises(RecipeError, match=r"no run or recipe 'toi'.*did you mean 'toy'"):
        runs.find(store, "toi")


def test_a_run_without_a_bundle_cannot_be_served(workshop: Workshop) -> None:
    workshop.run(ONE)
    with pytest.raises(StoreError, match="made no bundle"):
        runs.find_bundle("toy", workshop.store_path)
    with pytest.raises(RecipeError, match="no run or recipe"):
        runs.find_bundle("nothing", workshop.store_path)


def test_the_bundle_of_the_last_good_run_is_served(workshop: Workshop) -> None:
    stages = "  a: {use: toy:Bundled}\n"
    good = workshop.run(stages)
    assert workshop.run(stages, "a.fail=true").status == "failed"
    found = runs.find_bundle("toy", workshop.store_path)
    assert str(found) == good.stages["a"].path
    assert runs.find_bundle(good.run, workshop.store_path) == found
    moved = workshop.store_path.rename(workshop.root / "moved")
    assert runs.find_bundle("toy", moved).is_dir()
    moved.rename(workshop.store_path)
    workshop.store.discard(good.stages["a"].digest or "")
    with pytest.raises(StoreError, match=r"is gone; make it again with: lifecycle run"):
        runs.find_bundle("toy", workshop.store_path)


def test_what_a_stage_made_is_found_by_its_name(workshop: Workshop) -> None:
    stages = ONE + "  b: {use: toy:Bundled, fail: false}\n"
    first = workshop.run(stages)
    assert workshop.run(stages, "a.value=2", "b.fail=true").status == "failed"
    store = workshop.store_path
    newest = runs.find(workshop.store, "toy").stages["a"].path
    assert str(runs.find_folder("toy/a", store)) == newest != first.stages["a"].path
    # What the newest run has not made is that of the one before.
    assert str(runs.find_folder("toy/b", store)) == first.stages["b"].path
    assert str(runs.find_folder(f"{first.run}/a", store)) == first.stages["a"].path
    assert runs.find_folder("toy", store) == runs.find_bundle("toy", store)
    assert runs.find_folder(str(store), store) == store
    with pytest.raises(RecipeError, match=r"no run of 'toy' has made 'c' \(made: a, b\)"):
        runs.find_folder("toy/c", store)
    with pytest.raises(RecipeError, match=r"no run or recipe 'toi'.*did you mean 'toy'"):
        runs.find_folder("toi/a", store)
    with pytest.raises(RecipeError, match=r"recipe\.yaml is a file: name the folder"):
        runs.find_folder(str(workshop.root / "recipe.yaml"), store)


def test_damaged_run_records_are_passed_over(workshop: Workshop) -> None:
    run = workshop.run(ONE)
    (runs.folder(workshop.store, run.run) / "run.json").write_text("{")
    assert list(runs.newest_first(workshop.store)) == []


def test_a_run_is_known_by_its_folder_only(workshop: Workshop) -> None:
    run = workshop.run(ONE)
    folder = runs.folder(workshop.store, run.run)
    shutil.copytree(folder, folder.with_name("copy"))
    assert [found.run for found in runs.newest_first(workshop.store)] == [run.run]
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "../../elsewhere"}))
    assert list(runs.newest_first(workshop.store)) == []


def test_runs_of_machines_in_different_time_zones_are_in_order(
    workshop: Workshop, monkeypatch
) -> None:
    ids = []
    for zone in ("UTC-5", "UTC+5"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        ids.append(workshop.run(ONE).run)
    monkeypatch.undo()
    time.tzset()
    assert ids == sorted(ids, reverse=True)
    assert [run.run for run in runs.newest_first(workshop.store)] == ids[::-1]
