"""The bundle stage: what is in a bundle, and which models and reports do not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lifecycle.bundle import verify_bundle
from lifecycle.errors import GateError, StageError
from lifecycle.kinds import OnnxModel, Report
from lifecycle.pipeline.artifact import Artifact, Metrics
from lifecycle.stages.bundle import BundleStage
from lifecycle.stages.evaluate import Evaluate
from tests import tiny
from tests.conftest import RunStage, as_artifact

TUNED = "c" * 64
GATES = {"accuracy": ">= 99 %"}


@pytest.fixture
def evaluated(run_stage: RunStage, tmp_path: Path, learnt_onnx: OnnxModel) -> Artifact:
    """A report on `learnt_onnx` with one passed gate."""
    chat = tiny.conversations(tmp_path / "chat")
    return run_stage(Evaluate(model="m", data="d", gates=GATES), m=learnt_onnx, d=chat)


def changed_report(evaluated: Artifact, folder: Path, **changes: Any) -> Artifact:
    folder.mkdir()
    content = json.loads((evaluated.path / "report.json").read_text()) | changes
    (folder / "report.json").write_text(json.dumps(content))
    return as_artifact(Report, folder)


def with_history(model: OnnxModel) -> OnnxModel:
    """`model` as a run would have made it, from a tuned one."""
    tuned = {
        "digest": TUNED,
        "kind": "hf-model",
        "metrics": {"tokens_per_second": 123.4},
        "use": "finetune",
        "version": 1,
        "settings": {"learning_rate": 0.0002, "adapter": {"use": "lora", "r": 16}},
        "inputs": {},
        "source": {},
        "key": "k",
    }
    made_by = {
        "use": "export",
        "version": 1,
        "settings": {"target": {"use": "cpu"}},
        "inputs": {"model": TUNED},
        "source": {},
        "key": "k",
        "lineage": [tuned],
    }
    return OnnxModel(model.path, {**model.manifest, "made_by": made_by})


def test_a_bundle_has_all_that_serving_needs(
    run_stage: RunStage, learnt_onnx: OnnxModel, evaluated: Artifact
) -> None:
    stage = BundleStage(model="m", report="r", name="tiny/answers")
    bundle = run_stage(stage, m=with_history(learnt_onnx), r=evaluated)
    manifest = verify_bundle(bundle.path)
    assert manifest["name"] == "tiny/answers"
    assert manifest["gated"] is True
    assert manifest["model"]["digest"] == learnt_onnx.digest
    assert manifest["model"]["scheme"] == "fp32"
    assert manifest["report"]["metrics"]["accuracy"] == 1.0
    assert manifest["report"]["gates"][0]["bound"] == ">= 99 %"
    assert {file["path"] for file in manifest["files"]} == {
        *(file.path for file in learnt_onnx.files),
        "generation_config.json",
        "README.md",
    }
    assert bundle.metrics["gated"] is True
    assert bundle.metrics["bytes"] == sum(file["size"] for file in manifest["files"])


def test_a_name_that_no_client_could_send_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'two words' is no name for a model: use letters"):
        BundleStage(model="m", name="two words")


def test_the_lineage_goes_back_to_the_source(
    run_stage: RunStage, learnt_onnx: OnnxModel, evaluated: Artifact
) -> None:
    stage = BundleStage(model="m", report="r")
    bundle = run_stage(stage, m=with_history(learnt_onnx), r=evaluated)
    lineage = verify_bundle(bundle.path)["lineage"]
    assert [record["digest"] for record in lineage] == [
        TUNED,
        learnt_onnx.digest,
        evaluated.digest,
    ]
    assert lineage[0]["settings"]["learning_rate"] == 0.0002
    assert lineage[1]["inputs"] == {"model": TUNED}
    assert "metrics" not in lineage[0]


def test_the_card_tells_what_was_measured_and_how_it_was_made(
    run_stage: RunStage, learnt_onnx: OnnxModel, evaluated: Artifact
) -> None:
    stage = BundleStage(model="m", report="r")
    bundle = run_stage(stage, m=with_history(learnt_onnx), r=evaluated)
    card = (bundle.path / "README.md").read_text()
    assert card.startswith("# llama-fp32\n\nA `llama` decoder with fp32 weights")
    assert "| accuracy | 1 |  | >= 99 % |" in card
    assert "Every gate passed." in card
    assert "lifecycle serve" in card
    assert f"| export | `{learnt_onnx.digest[:12]}` | model `{TUNED[:12]}` |" in card
    assert 'learning_rate `0.0002`, adapter `{"use": "lora", "r": 16}`' in card


def test_a_bundle_without_a_report_says_that_it_is_ungated(
    run_stage: RunStage, learnt_onnx: OnnxModel
) -> None:
    bundle = run_stage(BundleStage(model="m"), m=learnt_onnx)
    manifest = verify_bundle(bundle.path)
    assert (manifest["gated"], manifest["report"]) == (False, None)
    assert "**ungated**" in (bundle.path / "README.md").read_text()


def test_a_report_without_gates_leaves_it_ungated(
    run_stage: RunStage, tmp_path: Path, learnt_onnx: OnnxModel, evaluated: Artifact
) -> None:
    report = changed_report(evaluated, tmp_path / "report", gates=[])
    bundle = run_stage(BundleStage(model="m", report="r"), m=learnt_onnx, r=report)
    manifest = verify_bundle(bundle.path)
    assert manifest["gated"] is False
    assert manifest["report"]["metrics"]["accuracy"] == 1.0
    assert "**ungated**" in (bundle.path / "README.md").read_text()


def test_a_report_on_another_model_is_refused(
    run_stage: RunStage, learnt_onnx: OnnxModel, unlearnt_onnx: OnnxModel, evaluated: Artifact
) -> None:
    with pytest.raises(StageError) as raised:
        run_stage(BundleStage(model="m", report="r"), m=unlearnt_onnx, r=evaluated)
    assert learnt_onnx.digest in str(raised.value)
    assert unlearnt_onnx.digest in str(raised.value)
    assert "evaluate 'm'" in str(raised.value)


def test_a_report_with_a_failed_gate_is_refused(
    run_stage: RunStage, tmp_path: Path, learnt_onnx: OnnxModel, evaluated: Artifact
) -> None:
    gate = {"metric": "accuracy", "bound": ">= 99 %", "measured": 0.5, "passed": False}
    report = changed_report(evaluated, tmp_path / "report", gates=[gate])
    with pytest.raises(GateError, match="report 'r' has failed gates: accuracy"):
        run_stage(BundleStage(model="m", report="r"), m=learnt_onnx, r=report)


def test_equal_bundles_have_equal_bytes(run_stage: RunStage, learnt_onnx: OnnxModel) -> None:
    one, two = (run_stage(BundleStage(model="m"), m=learnt_onnx) for _ in range(2))
    assert one.digest == two.digest


def generation_config(bundle: Artifact) -> Metrics:
    return json.loads((bundle.path / "generation_config.json").read_text())


def test_generation_defaults_are_made(run_stage: RunStage, learnt_onnx: OnnxModel) -> None:
    stage = BundleStage.model_validate({"model": "m", "generation": {"max_new_tokens": 9}})
    config = generation_config(run_stage(stage, m=learnt_onnx))
    assert config == {"bos_token_id": None, "eos_token_id": [0], "max_new_tokens": 9}


def test_generation_defaults_are_kept_and_overridden(
    run_stage: RunStage, tmp_path: Path, learnt: Artifact
) -> None:
    folder = tmp_path / "model"
    model = tiny.export(learnt, folder)  # pyright: ignore
    kept = {"do_sample": False, "top_k": 20, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(kept))
    model = as_artifact(OnnxModel, folder)
    stage = BundleStage.model_validate({"model": "m", "generation": {"temperature": 0.7}})
    config = generation_config(run_stage(stage, m=model))
    assert config["temperature"] == 0.7
    assert config["top_k"] == 20
    assert config["eos_token_id"] == 0
    assert config["do_sample"] is True
    assert json.loads((folder / "generation_config.json").read_text()) == kept


@pytest.mark.parametrize(
    "settings",
    [
        {"generation": {"temprature": 1}},
        {"generation": {"top_p": 2}},
        {"name": "../up"},
        {"nam": 1},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BundleStage.model_validate({"model": "m", **settings})
