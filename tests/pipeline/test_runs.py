from __future__ import annotations

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
    (workshop.root / "bundling.py").write_text(
        "from lifecycle.kinds import Bundle\n"
        "from lifecycle.pipeline.stage import Stage\n"
        "class Pack(Stage):\n"
        "    produces = Bundle\n"
        "    fail: bool = False\n"
        "    def run(self, ctx):\n"
        "        assert not self.fail\n"
        "        (ctx.out / 'manifest.json').write_text('{}')\n"
        "        return {}\n"
    )
    stages = "  a: {use: ./bundling.py:Pack}\n"
    good = workshop.run(stages)
    assert workshop.run(stages, "a.fail=true").status == "failed"
    found = runs.find_bundle("toy", workshop.store_path)
    assert str(found) == good.stages["a"].path
    assert runs.find_bundle(good.run, workshop.store_path) == found
    workshop.store.discard(good.stages["a"].digest or "")
    with pytest.raises(StoreError, match=r"is gone; make it again with: lifecycle run"):
        runs.find_bundle("toy", workshop.store_path)


def test_damaged_run_records_are_passed_over(workshop: Workshop) -> None:
    run = workshop.run(ONE)
    (runs.folder(workshop.store, run.run) / "run.json").write_text("{")
    assert list(runs.newest_first(workshop.store)) == []
