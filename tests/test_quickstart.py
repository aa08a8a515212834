"""The whole life of a model, through the command line, in the quickstart's reduced form."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reduced import OVERRIDES

pytestmark = pytest.mark.slow


def lifecycle(store: Path, *args: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON of the last line, and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "lifecycle.cli", *args, "--json"],
        env=os.environ | {"LIFECYCLE_STORE": str(store)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.fixture(scope="module")
def first(quickstart_store: Path) -> dict[str, Any]:
    code, result, err = lifecycle(quickstart_store, "run", "quickstart", *OVERRIDES)
    assert code == 0, err
    return result


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {name: stage["status"] for name, stage in result["stages"].items()}


def test_every_stage_gives_an_artifact(first: dict[str, Any]) -> None:
    assert set(statuses(first).values()) <= {"done", "cached"}
    assert all(Path(stage["path"]).is_dir() for stage in first["stages"].values())


def test_every_step_of_the_models_life_is_measured(first: dict[str, Any]) -> None:
    for name in ("before", "after", "after_merge", "check_onnx", "check_int8", "check_int4"):
        metrics = first["stages"][name]["metrics"]
        assert metrics["perplexity"] > 1
        assert 0 <= metrics["accuracy"] <= 1
    assert first["stages"]["check_onnx"]["metrics"]["logit_max_diff"] < 1e-4
    assert first["stages"]["check_int8"]["metrics"]["perplexity_ratio"] < 1.05


def test_the_second_run_is_cached(first: dict[str, Any], quickstart_store: Path) -> None:
    _, second, _ = lifecycle(quickstart_store, "run", "quickstart", *OVERRIDES)
    assert set(statuses(second).values()) == {"cached"}
    digests = {name: stage["digest"] for name, stage in first["stages"].items()}
    assert {name: stage["digest"] for name, stage in second["stages"].items()} == digests


def test_only_what_depends_on_int8_would_run(first: dict[str, Any], quickstart_store: Path) -> None:
    assert first["status"] == "ok"
    _, planned, _ = lifecycle(
        quickstart_store, "plan", "quickstart", *OVERRIDES, "int8.skip=[lm_head]"
    )
    to_run = {name for name, item in planned["stages"].items() if item["status"] == "run"}
    assert to_run == {"int8", "check_int8", "bundle"}


def test_what_a_stage_made_goes_by_its_name(first: dict[str, Any], quickstart_store: Path) -> None:
    options = ["--batch", "1", "--prompt", "4", "--output", "2", "--requests", "1"]
    options += ["--draft-model", "quickstart/int8", "--draft-tokens", "2"]
    code, found, err = lifecycle(quickstart_store, "bench", "engine", "quickstart/int4", *options)
    assert code == 0, err
    assert found["model"]["name"] == "quickstart/int4"
    assert found["model"]["path"] == first["stages"]["int4"]["path"]
    assert found["engine"]["draft_model"] == first["stages"]["int8"]["path"]
    command = [sys.executable, "-m", "lifecycle.cli", "chat", "quickstart/int4"]
    done = subprocess.run(
        [*command, "--store", str(quickstart_store)], input="", capture_output=True, text=True
    )
    assert done.stderr.startswith("quickstart/int4 is ungated"), done.stderr


def test_no_held_out_function_is_in_any_training_text(first: dict[str, Any]) -> None:
    stages = first["stages"]
    task = Path(stages["task"]["path"], "test.jsonl").read_text().splitlines()
    heads = [json.loads(row)["messages"][-2]["content"] for row in task]
    train = Path(stages["text"]["path"], "train.jsonl").read_text().splitlines()
    corpus = "\n".join(json.loads(row)["text"] for row in train)
    tuning = Path(stages["task"]["path"], "train.jsonl").read_text()
    assert heads
    for head in heads:
        assert head not in corpus
        assert json.dumps(head, ensure_ascii=False)[1:-1] not in tuning


def test_a_gate_that_fails_makes_no_bundle(first: dict[str, Any], quickstart_store: Path) -> None:
    assert first["status"] == "ok"
    code, result, err = lifecycle(
        quickstart_store, "run", "quickstart", *OVERRIDES, "check_int8.gates.accuracy=>= 101 %"
    )
    assert code == 1
    assert statuses(result)["check_int8"] == "failed"
    assert statuses(result)["bundle"] == "skipped"
    assert "101" in err
    assert "accuracy" in result["stages"]["check_int8"]["error"]


def test_a_bundle_with_a_changed_byte_is_not_served(
    first: dict[str, Any], quickstart_store: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(first["stages"]["bundle"]["path"], bundle)
    weights = bundle / "model.onnx.data"
    weights.chmod(0o644)
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    code, _, err = lifecycle_serve(bundle)
    assert code == 1
    assert "model.onnx.data" in err


def lifecycle_serve(bundle: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "lifecycle.cli", "serve", str(bundle), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr
