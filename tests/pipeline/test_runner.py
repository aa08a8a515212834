from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from lifecycle.errors import (
    DataError,
    GateError,
    InterruptedRun,
    MissingExtraError,
    RecipeError,
    StageError,
    StoreError,
)
from lifecycle.pipeline import runs
from lifecycle.pipeline.plan import action_of
from lifecycle.pipeline.recipe import load
from tests.workshop import Workshop, statuses

CHAIN = """
  a: {use: toy:Const, value: 2}
  b: {use: toy:Add, left: a, plus: 1}
  c: {use: toy:Add, left: b, others: [a]}
"""


def leftovers(workshop: Workshop) -> list[str]:
    return [p.name for p in (workshop.store_path / "tmp").iterdir()]


def test_second_run_is_cached(workshop: Workshop) -> None:
    first = workshop.run(CHAIN)
    assert statuses(first) == "a=done b=done c=done"
    assert first.stages["c"].metrics == {"value": 5}
    second = workshop.run(CHAIN)
    assert statuses(second) == "a=cached b=cached c=cached"
    assert [s.digest for s in second.stages.values()] == [s.digest for s in first.stages.values()]
    assert [list(s.metrics) for s in second.stages.values()] == [["value"]] * 3
    assert second.status == "ok"


def test_only_what_depends_on_a_change_runs(workshop: Workshop) -> None:
    workshop.run(CHAIN)
    assert statuses(workshop.run(CHAIN, "b.plus=2")) == "a=cached b=done c=done"


def test_equal_bytes_upstream_leave_downstream_cached(workshop: Workshop) -> None:
    workshop.run(CHAIN)
    assert statuses(workshop.run(CHAIN, "a.rate=0.25")) == "a=done b=cached c=cached"


def test_runtime_settings_are_not_part_of_the_key(workshop: Workshop) -> None:
    workshop.run(CHAIN)
    assert statuses(workshop.run(CHAIN, "a.workers=8")) == "a=cached b=cached c=cached"


def test_names_are_not_part_of_the_key(workshop: Workshop) -> None:
    workshop.run("  a: {use: toy:Const}\n")
    assert statuses(workshop.run("  other: {use: toy:Const}\n")) == "other=cached"


def test_force_and_until(workshop: Workshop) -> None:
    workshop.run(CHAIN)
    assert statuses(workshop.run(CHAIN, force=["a"])) == "a=done b=cached c=cached"
    assert statuses(workshop.run(CHAIN, until="b")) == "a=cached b=cached"
    with pytest.raises(RecipeError, match="no stage 'cc'; did you mean 'c'"):
        workshop.run(CHAIN, until="cc")


def test_a_source_file_is_known_by_its_bytes(workshop: Workshop) -> None:
    source = workshop.root / "n.txt"
    source.write_text("4")
    stages = "  a: {use: toy:FromFile, path: n.txt}\n"
    workshop.run(stages)
    source.touch()
    assert statuses(workshop.run(stages)) == "a=cached"
    source.write_text("5")
    assert "source path changed" in workshop.plan(stages)["a"].because
    assert workshop.run(stages).stages["a"].metrics == {"value": 5}
    made_by = workshop.store.path(workshop.run(stages).stages["a"].digest or "") / "artifact.json"
    assert str(workshop.root) not in made_by.read_text()


def test_the_code_of_a_local_stage_is_part_of_the_key(workshop: Workshop) -> None:
    code = (
        "from lifecycle.pipeline.stage import Stage\nfrom tests.pipeline.toys import Number, write\n"
        "class Mine(Stage):\n    produces = Number\n    def run(self, ctx): return write(ctx, {})\n"
    )
    for name, value in (("one", 1), ("two", 2)):
        folder = workshop.root / name
        folder.mkdir()
        (folder / "mine.py").write_text(code.format(value))
        path = folder / "recipe.yaml"
        path.write_text("stages:\n  a: {use: ./mine.py:Mine}\n")
    first, second = (load(str(workshop.root / n / "recipe.yaml")) for n in ("one", "two"))
    assert action_of(first.entries["a"], {}).key != action_of(second.entries["a"], {}).key


def test_the_code_of_a_local_plug_in_is_part_of_the_key(workshop: Workshop) -> None:
    (workshop.root / "mine.py").write_text(
        "from lifecycle.pipeline.stage import Stage\nfrom tests.pipeline.toys import Number, Shape\n"
        "class Shaped(Stage):\n    produces = Number\n    shape: Shape\n"
        "    def run(self, ctx): return {}\n"
    )
    shape = workshop.root / "shape.py"
    shape.write_text("from tests.pipeline.toys import Square\nclass Wide(Square): ...\n")
    stages = "  a: {use: ./mine.py:Shaped, shape: ./shape.py:Wide}\n"
    entry = workshop.load(stages).entries["a"]
    first = action_of(entry, {})
    shape.write_text(shape.read_text() + "# the next version\n")
    assert first == action_of(entry, {}), "the code that was loaded is what runs"
    assert first.key != action_of(workshop.load(stages).entries["a"], {}).key


def test_a_source_that_changes_while_it_is_read_is_not_kept(workshop: Workshop) -> None:
    (workshop.root / "n.txt").write_text("1")
    stages = "  a: {use: toy:Restless, path: n.txt}\n"
    assert statuses(workshop.run(stages)) == "a=failed"
    assert re.search(r"a: path \(.*n\.txt\) changed while the stage read it", str(workshop.error))
    assert leftovers(workshop) == []
    assert workshop.run(stages).stages["a"].metrics == {"value": 2}


def test_a_source_folder_with_files_that_cannot_be_read(workshop: Workshop, monkeypatch) -> None:
    folder = workshop.root / "texts"
    folder.mkdir()
    (folder / "gone").symlink_to("nowhere")
    (folder / "a.txt").write_text("1")
    entry = workshop.load("  a: {use: toy:FromFile, path: texts}\n").entries["a"]
    assert list(action_of(entry, {}).source["path"]) == ["a.txt"]

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lifecycle.pipeline.artifact.hash_file", refuse)
    with pytest.raises(DataError, match=r"texts/a\.txt: cannot be read: Permission denied"):
        action_of(entry, {})


def test_a_flipped_byte_is_named_and_mended(workshop: Workshop) -> None:
    run = workshop.run(CHAIN)
    path = Path(run.stages["b"].path or "") / "value"
    path.chmod(0o644)
    path.write_text("9")
    assert "has changed since it was recorded" in workshop.plan(CHAIN)["b"].because[0]
    again = workshop.run(CHAIN)
    assert statuses(again) == "a=cached b=done c=cached"
    assert f"{path} has changed since it was recorded; making it again" in workshop.said
    assert again.stages["b"].digest == run.stages["b"].digest
    assert path.read_text() == "3"


@pytest.mark.parametrize("damage", ["missing", "added", "manifest", "gone"])
def test_other_damage_is_mended_too(workshop: Workshop, damage: str) -> None:
    run = workshop.run(CHAIN)
    path = Path(run.stages["b"].path or "")
    if damage == "missing":
        (path / "value").unlink()
    elif damage == "added":
        (path / "extra").write_text("x")
    elif damage == "manifest":
        (path / "artifact.json").chmod(0o644)
        (path / "artifact.json").write_text("{")
    else:
        workshop.store.discard(run.stages["b"].digest or "")
    assert statuses(workshop.run(CHAIN)) == "a=cached b=done c=cached"


def test_a_failure_is_never_cached_and_scratch_stays(workshop: Workshop) -> None:
    stages = "  a: {use: toy:Slow, steps: 5, fail_at: 3}\n  b: {use: toy:Add, left: a}\n"
    run = workshop.run(stages)
    assert isinstance(workshop.error, StageError)
    assert statuses(run) == "a=failed b=skipped"
    assert "ValueError: failed on purpose" in (run.stages["a"].error or "")
    assert run.status == "failed"
    assert leftovers(workshop) == []
    log = runs.folder(workshop.store, run.run) / "a.log"
    assert "Traceback" in log.read_text()
    again = workshop.run(stages, "a.fail_at=-1")
    assert statuses(again) == "a=done b=done"
    assert "from 3" in workshop.said
    assert list((workshop.store_path / "scratch").iterdir()) == []


def test_a_gate_that_fails_stops_the_run(workshop: Workshop) -> None:
    stages = CHAIN + "  g: {use: toy:Gate, number: c, most: 4}\n  d: {use: toy:Add, left: g}\n"
    run = workshop.run(stages)
    assert isinstance(workshop.error, GateError)
    assert statuses(run) == "a=done b=done c=done g=failed d=skipped"
    assert "value is 5, the bound is <= 4" in (run.stages["g"].error or "")
    assert run.stages["g"].metrics == {"value": 5}
    assert workshop.run(stages).status == "failed"


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("empty", StageError, "wrote no file"),
        ("link", StageError, "symbolic link"),
        ("data", DataError, "data.jsonl:3: no JSON"),
        ("space", StoreError, "no space left"),
        ("SafetensorError: No space left on device", StoreError, "no space left"),
        ("odd", StageError, "RuntimeError: odd"),
        ("nothing", StageError, "must return what it measured as a dict, not None"),
        ("path", StageError, "a metric must be a number, a text, a list or a dict, not PosixPath"),
        ("torch", MissingExtraError, "pip install 'lifecycle-toolkit[train]'"),
        ("elsewhere", StageError, "No module named 'elsewhere'"),
    ],
)
def test_what_a_stage_does_wrong(workshop: Workshop, how: str, kind: type, words: str) -> None:
    run = workshop.run(f"  a: {{use: toy:Misbehaving, how: '{how}'}}\n")
    assert isinstance(workshop.error, kind)
    assert words in str(workshop.error)
    assert statuses(run) == "a=failed"
    assert leftovers(workshop) == []
    assert list((workshop.store_path / "objects").iterdir()) == []


def test_a_full_disk_while_recording_leaves_nothing(workshop: Workshop, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lifecycle.pipeline.files.fsync_tree", full)
        run = workshop.run(CHAIN)
    assert isinstance(workshop.error, StoreError)
    assert "free some space" in str(workshop.error)
    assert statuses(run) == "a=failed b=skipped c=skipped"
    assert leftovers(workshop) == []
    assert list((workshop.store_path / "records").iterdir()) == []
    assert statuses(workshop.run(CHAIN)) == "a=done b=done c=done"


def test_metrics_that_json_cannot_hold_become_null(workshop: Workshop) -> None:
    run = workshop.run("  a: {use: toy:Misbehaving, how: nan}\n")
    assert run.stages["a"].metrics == {"value": 1, "loss": None}


def test_plan_names_what_changed(workshop: Workshop) -> None:
    assert workshop.plan(CHAIN)["a"].because == ["it has not been made yet"]
    assert workshop.plan(CHAIN)["b"].because == ["input a will be made again"]
    workshop.run(CHAIN)
    assert {p.status for p in workshop.plan(CHAIN).values()} == {"cached"}
    planned = workshop.plan(CHAIN, "b.plus=5", "a.workers=3")
    assert planned["a"].status == "cached"
    assert planned["b"].because == ["plus: 1 -> 5"]
    assert planned["c"].because == ["input b will be made again"]
    workshop.run(CHAIN, "a.value=9", until="a")
    planned = workshop.plan(CHAIN, "a.value=9")
    assert planned["b"].because == ["input left changed"]


def test_lineage_names_every_ancestor_once(workshop: Workshop) -> None:
    run = workshop.run(CHAIN)
    path = Path(run.stages["c"].path or "") / "artifact.json"
    made_by = json.loads(path.read_text())["made_by"]
    assert [a["digest"] for a in made_by["lineage"]] == [
        run.stages["a"].digest,
        run.stages["b"].digest,
    ]
    assert made_by["lineage"][1]["settings"] == {"plus": 1, "others": []} or made_by["lineage"][1][
        "settings"
    ] == {"plus": 1}


def wait_for(path: Path, pattern: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        assert time.monotonic() < end, f"{pattern} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_next_run_goes_on(workshop: Workshop, number: int) -> None:
    path = workshop.write("  a: {use: toy:Slow, steps: 200, pause: 0.05}\n")
    process = workshop.command("run", str(path), "--json")
    wait_for(workshop.store_path, "scratch/*/step")
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "go on with: lifecycle run" in err
    result = json.loads(out.splitlines()[-1])
    assert result["status"] == "interrupted"
    assert result["stages"]["a"]["status"] == "failed"
    run = workshop.run("  a: {use: toy:Slow, steps: 200, pause: 0.05}\n", "a.steps=200")
    assert run.status == "ok"
    assert "from 0" not in workshop.said


def test_a_second_signal_stops_at_once(workshop: Workshop) -> None:
    path = workshop.write("  a: {use: toy:Deaf}\n")
    process = workshop.command("run", str(path))
    wait_for(workshop.store_path, "scratch/*")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_kill_leaves_no_half_artifact_and_the_run_is_listed_as_killed(workshop: Workshop) -> None:
    stages = "  a: {use: toy:Slow, steps: 60, pause: 0.02}\n  b: {use: toy:Add, left: a}\n"
    path = workshop.write(stages)
    process = workshop.command("run", str(path))
    wait_for(workshop.store_path, "scratch/*/step")
    process.kill()
    process.communicate()
    (killed,) = runs.newest_first(workshop.store)
    assert killed.status == "killed"
    assert statuses(killed) == "a=killed b=skipped"
    (scratch,) = (workshop.store_path / "scratch").iterdir()
    assert killed.stages["a"].key == scratch.name  # which is how `gc` knows to keep it
    assert statuses(workshop.run(stages)) == "a=done b=done"


def test_two_processes_do_the_work_once(workshop: Workshop) -> None:
    stages = "  a: {use: toy:Slow, steps: 30, pause: 0.05}\n"
    path = workshop.write(stages)
    both = [workshop.command("run", str(path), "--json") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    results = [json.loads(out.splitlines()[-1])["stages"]["a"] for out, _ in outputs]
    assert sorted(r["status"] for r in results) == ["cached", "done"]
    assert len({r["digest"] for r in results}) == 1
    assert any("waiting for another run" in err for _, err in outputs)


def test_interrupted_is_reported_as_such(workshop: Workshop, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tests.pipeline.toys.write", interrupt)
    monkeypatch.setattr("lifecycle.pipeline.store.Store.commit", interrupt)
    run = workshop.run("  a: {use: toy:Const}\n")
    assert isinstance(workshop.error, InterruptedRun)
    assert run.status == "interrupted"


LARGEST = """
  a: {use: toy:Const, value: 2}
  best: {use: toy:Largest, number: a, plus: [1, 5, -9]}
"""


def test_a_stage_builds_others_as_a_recipe_would(workshop: Workshop) -> None:
    run = workshop.run(LARGEST)
    assert "[best] sum 0: " in workshop.said
    assert [line.rpartition(" ")[2] for line in workshop.said.splitlines() if ": /" in line] == [
        "done"
    ] * 3
    entries = (
        LARGEST
        + "  one: {use: toy:Add, left: a, plus: 1}\n  two: {use: toy:Add, left: one, plus: 5}\n"
    )
    again = workshop.run(entries)
    assert statuses(again) == "a=cached best=cached one=cached two=cached"
    # The chosen bytes are those of the entry, linked and not copied.
    assert run.stages["best"].digest == again.stages["two"].digest
    assert run.stages["best"].metrics == {"digest": again.stages["two"].digest}


def test_what_a_stage_built_before_it_failed_is_not_built_again(workshop: Workshop) -> None:
    assert statuses(workshop.run(LARGEST, "best.fail_after=2")) == "a=done best=failed"
    records = {p: p.stat().st_mtime_ns for p in (workshop.store_path / "records").iterdir()}
    assert len(records) == 3
    assert statuses(workshop.run(LARGEST)) == "a=cached best=done"
    assert {p: p.stat().st_mtime_ns for p in records} == records
    assert workshop.said.count("Add cached") == 2
    assert workshop.said.count("Add done") == 1


def test_a_stage_in_a_file_may_build_only_others(workshop: Workshop) -> None:
    workshop.run("  a: {use: toy:Endless}\n")
    assert "builds itself" in str(workshop.error)
