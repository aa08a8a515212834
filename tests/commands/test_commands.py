"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lifecycle.cli import COMMANDS, main
from lifecycle.pipeline import registry, runs, shipped
from tests.workshop import Workshop

RECIPE = "  a: {use: toy:Const, value: 2}\n  b: {use: toy:Add, left: a, plus: 1}\n"


@pytest.fixture
def toy(workshop: Workshop, monkeypatch) -> str:
    monkeypatch.setenv("LIFECYCLE_STORE", str(workshop.store_path))
    return str(workshop.write(RECIPE))


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lifecycle.cli import main; code = main(['--help']); "
        "heavy = {'pydantic', 'yaml', 'rich', 'numpy', 'torch', 'onnxruntime'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: lifecycle {name}" in capsys.readouterr().out


def test_a_mistyped_command(capsys) -> None:
    assert main(["rum"]) == 2
    assert "no command 'rum'; did you mean 'run'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["run"], ["gc", "--keep", "x"], ["gc", "--keep", "-1"], ["runs", "show"], ["run", "--x"]],
)
def test_bad_arguments_end_with_2(argv: list[str], capsys) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_only_what_is_missing_is_called_required(capsys) -> None:
    assert main(["run"]) == 2
    assert "required: RECIPE (see" in capsys.readouterr().err


def test_run_json_is_the_last_line_and_has_the_agreed_shape(toy: str, capsys) -> None:
    assert main(["run", toy, "b.plus=2", "--json"]) == 0
    result = last_json(capsys)
    assert set(result) == {"run", "recipe", "status", "stages"}
    assert (result["recipe"], result["status"]) == ("toy", "ok")
    stage = result["stages"]["b"]
    assert set(stage) == {"use", "status", "seconds", "digest", "path", "metrics"}
    assert stage["metrics"] == {"value": 4}
    assert Path(stage["path"], "value").read_text() == "4"


def test_run_shows_a_summary(toy: str, capsys) -> None:
    assert main(["run", toy]) == 0
    out = capsys.readouterr().out
    assert "value 3" in out
    assert "of 'toy': ok" in out


def test_a_failed_run_prints_the_command_that_goes_on(workshop: Workshop, toy: str, capsys) -> None:
    path = workshop.write("  a: {use: toy:Slow, fail_at: 2}\n", name="my recipe.yaml")
    assert main(["run", str(path), "a.pause=0.0", "--until", "a", "--json"]) == 1
    captured = capsys.readouterr()
    assert f"go on with: lifecycle run '{path}' a.pause=0.0 --until a" in captured.err
    result = json.loads(captured.out.splitlines()[-1])
    assert result["status"] == "failed"
    assert "failed on purpose" in result["stages"]["a"]["error"]


def test_a_bad_recipe_ends_with_2_and_still_prints_json(workshop: Workshop, capsys) -> None:
    path = workshop.write("  a: {use: toy:Const, valu: 1}\n")
    assert main(["run", str(path), "--json"]) == 2
    captured = capsys.readouterr()
    assert "recipe.yaml:3: stages.a.valu: unknown key 'valu'" in captured.err
    assert json.loads(captured.out)["status"] == "failed"


def test_plan_json(toy: str, capsys) -> None:
    main(["run", toy])
    assert main(["plan", toy, "b.plus=9", "--json"]) == 0
    assert last_json(capsys) == {
        "stages": {
            "a": {"status": "cached", "because": []},
            "b": {"status": "run", "because": ["plus: 1 -> 9"]},
        }
    }
    assert main(["plan", toy, "b.plus=9"]) == 0
    assert "plus: 1 -> 9" in capsys.readouterr().out


def test_runs_list_show_compare(toy: str, capsys) -> None:
    ids = []
    for value in (1, 2):
        main(["run", toy, f"b.plus={value}", "--json"])
        ids.append(last_json(capsys)["run"])
    main(["runs", "--json"])
    assert {r["run"] for r in last_json(capsys)["runs"]} == set(ids)
    main(["runs", "show", ids[0], "--json"])
    shown = last_json(capsys)
    assert shown["stages"]["b"]["inputs"] == {"left": "a"}
    assert shown["settings"]["b"]["plus"] == 1
    main(["runs", "compare", *ids, "--json"])
    found = last_json(capsys)
    assert found["settings"] == [{"name": "b.plus", "first": 1, "second": 2}]
    assert found["metrics"] == [{"name": "b.value", "first": 3, "second": 4}]
    for argv in (["runs"], ["runs", "show", "toy"], ["runs", "compare", *ids]):
        assert main(argv) == 0
    assert "b.plus" in capsys.readouterr().out


def test_a_run_as_a_page(workshop: Workshop, toy: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lifecycle.pipeline.progress.RECORD_EVERY", 0)
    path = workshop.write("  a: {use: toy:Slow, steps: 5}\n  b: {use: toy:Add, left: a}\n")
    assert main(["run", str(path), "name=<b>bold</b>"]) == 0
    (rows,) = workshop.store_path.glob("runs/*/a.jsonl")
    with rows.open("a") as file:
        file.write('{"time": 1')  # as a kill or a full disk may leave it
    page = tmp_path / "run.html"
    assert main(["runs", "show", "<b>bold</b>", "--html", str(page)]) == 0
    text = page.read_text()
    assert "<h1>&lt;b&gt;bold&lt;/b&gt;</h1>" in text
    assert text.count("<polyline") == 1
    assert '<meta name="viewport"' in text
    assert text.count("<table") == text.count("<div><table") > 0  # wide ones scroll by themselves
    assert 'href="#a"' in text
    assert main(["runs", "show", "<b>bold</b>", "--html", str(tmp_path / "no" / "x.html")]) == 2


def test_recipes_list_show_copy(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main(["recipes", "--json"])
    assert set(last_json(capsys)["recipes"]) == set(shipped.recipes())
    assert main(["recipes", "show", "quickstart"]) == 0
    text = capsys.readouterr().out
    assert main(["recipes", "copy", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text().strip() == text.strip()
    assert main(["recipes", "copy", "quickstart"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["plan", "quickstart.yaml", "--json"]) == 0
    assert main(["recipes", "copy", "quickstart", "mine.yaml"]) == 0
    mine = (tmp_path / "mine.yaml").read_text()
    assert mine.startswith("# lifecycle run mine.yaml\nname: mine\n")
    assert mine.partition("description")[2] == text.partition("description")[2]
    (tmp_path / "no-text").write_bytes(b"\xff")
    assert main(["recipes", "show", "no-text"]) == 2


def test_stages_lists_and_describes(capsys) -> None:
    main(["stages", "--json"])
    assert {"corpus", "finetune", "export", "bundle"} <= set(last_json(capsys)["stages"])
    main(["stages", "finetune", "--json"])
    settings = {s["name"]: s for s in last_json(capsys)["settings"]}
    assert settings["model"]["type"] == "name of an hf-model"
    assert all(s["doc"] or s["name"] in ("model", "data") for s in settings.values())
    assert main(["stages"]) == main(["stages", "finetune"]) == 0
    assert main(["stages", "finetun"]) == 2


def test_doctor(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = last_json(capsys)
    assert found["cores"] >= 1
    assert "CPUExecutionProvider" in found["execution_providers"]
    assert found["missing_extras"] == {}
    assert main(["doctor", "--build"]) == 0
    assert f"kernels of engines on the CPU: {found['kernels']['used']}" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert last_json(capsys)["kernels"]["compiled"] is True


def test_schema_accepts_shipped_recipes_and_names_their_keys(capsys) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["finetune"]["properties"]["use"] == {"const": "finetune"}
    stage = schema["$defs"]["stage"]
    assert {b["then"]["$ref"] for b in stage["allOf"]} >= {"#/$defs/export", "#/$defs/bundle"}


def test_gc_removes_what_only_old_runs_used(workshop: Workshop, toy: str, capsys) -> None:
    for value in range(4):  # b.plus=0 gives the bytes of a, which the kept run uses
        main(["run", toy, f"b.plus={value}"])
    capsys.readouterr()
    main(["gc", "--keep", "1", "--dry-run", "--json"])
    assert last_json(capsys)["runs"] == 3
    assert len(list((workshop.store_path / "runs").iterdir())) == 4
    main(["gc", "--keep", "1", "--json"])
    assert last_json(capsys)["artifacts"] == 2
    main(["plan", toy, "b.plus=3", "--json"])
    planned = last_json(capsys)["stages"]
    assert {p["status"] for p in planned.values()} == {"cached"}
    main(["plan", toy, "b.plus=1", "--json"])
    assert last_json(capsys)["stages"]["b"]["status"] == "run"


def test_gc_keeps_scratch_only_where_there_is_something_to_resume(workshop: Workshop) -> None:
    stages = "  a: {use: toy:Const}\n  b: {use: toy:Slow, steps: 5, fail_at: 3}\n"
    run = workshop.run(stages)
    left = workshop.store.scratch(run.stages["a"].key or "")
    assert main(["gc", "--store", str(workshop.store_path)]) == 0
    assert not left.exists()
    assert (workshop.store.scratch(run.stages["b"].key or "") / "step").exists()


def test_gc_keeps_what_a_stage_has_built_on_its_way(workshop: Workshop) -> None:
    stages = "  a: {use: toy:Const}\n  b: {use: toy:Largest, number: a, plus: [2, 1]}\n"
    workshop.run(stages, "b.fail_after=1")
    assert main(["gc", "--store", str(workshop.store_path)]) == 0
    assert workshop.run(stages).status == "ok"
    assert "sum 0: " in workshop.said and workshop.said.count("Add cached") == 1


@pytest.mark.parametrize("command", ["stages", "schema"])
def test_a_broken_plug_in_hides_no_other(command: str, capsys, monkeypatch) -> None:
    known = registry._entries
    broken = EntryPoint("broken", "tests.nowhere:Broken", registry.STAGES)
    found = {"broken": broken, "corpus": known(registry.STAGES)["corpus"]}
    groups = {registry.STAGES: found}
    monkeypatch.setattr(registry, "_entries", lambda group: groups.get(group) or known(group))
    assert main([command, "--json"]) == 0
    captured = capsys.readouterr()
    assert "warning: stage 'broken' is left out" in captured.err
    assert "corpus" in captured.out


def test_gc_keeps_the_last_run_that_succeeded(workshop: Workshop, toy: str, capsys) -> None:
    main(["run", toy])
    path = workshop.write("  a: {use: toy:Slow, fail_at: 1}\n", name="bad.yaml")
    for _ in range(3):
        assert main(["run", str(path)]) == 1
    capsys.readouterr()
    main(["gc", "--keep", "1", "--json"])
    assert last_json(capsys)["runs"] == 2
    main(["plan", toy, "--json"])
    assert {p["status"] for p in last_json(capsys)["stages"].values()} == {"cached"}


def test_a_reader_that_goes_away_is_no_error(toy: str) -> None:
    command = f"{sys.executable} -m lifecycle.cli stages | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert "Traceback" not in done.stderr


def test_gc_leaves_what_the_store_has_not_made(workshop: Workshop, toy: str) -> None:
    main(["run", toy])
    mine = workshop.store_path / "objects" / "mine"
    mine.write_text("mine")
    assert main(["gc", "--keep", "0"]) == 0
    assert [path.name for path in (workshop.store_path / "objects").iterdir()] == ["mine"]


def test_only_a_run_makes_a_store(tmp_path: Path, toy: str, capsys) -> None:
    nowhere = ["--store", str(tmp_path / "nowhere")]
    for argv in (["runs"], ["gc"], ["runs", "show", "toy"]):
        assert main([*argv, *nowhere]) == 1
        assert "there is no store at" in capsys.readouterr().err
    assert main(["plan", toy, *nowhere]) == 0
    assert not (tmp_path / "nowhere").exists()


def test_options_may_stand_between_the_words(toy: str, tmp_path: Path, capsys) -> None:
    main(["run", toy])
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["runs", "show", "--html", str(page), "toy"]) == 0
    assert page.is_file()
    assert main(["runs", "compare", "--json", "toy", "toy"]) == 0
    assert main(["recipes", "copy", "--json", "quickstart", str(tmp_path / "mine.yaml")]) == 0


def test_the_hint_after_a_run_names_the_store(workshop: Workshop, tmp_path: Path, capsys) -> None:
    path = workshop.write("  a: {use: toy:Bundled}\n")
    place = str(tmp_path / "my store")
    assert main(["run", str(path), "--store", place]) == 0
    assert f"serve it with: lifecycle serve toy --store '{place}'" in capsys.readouterr().out


def test_only_what_can_be_served_is_offered_for_serving(workshop: Workshop, capsys) -> None:
    path = workshop.write("  a: {use: toy:Bundled, decoder: false}\n")
    assert main(["run", str(path), "--store", str(workshop.store_path)]) == 0
    out = capsys.readouterr().out
    assert "ok in" in out
    assert "serve it" not in out
    assert f"bundle: {runs.find_bundle('toy', workshop.store_path)}" in out
