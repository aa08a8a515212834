"""Bundles of graphs that are no decoders: what they say, and that they cannot be served."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifecycle.bundle import verify_bundle
from lifecycle.errors import EngineError, StageError
from lifecycle.pipeline.artifact import Artifact
from lifecycle.stages.bundle import BundleStage
from lifecycle.stages.onnx import Onnx
from lifecycle.stages.quantize import Quantize
from serving.service import open_service
from tests.conftest import RunStage
from tests.graph import graphs


@pytest.fixture
def small(tmp_path: Path, run_stage: RunStage) -> Artifact:
    source = graphs.write_encoder(tmp_path / "user" / "e.onnx", graphs.encoder_weights())
    model = run_stage(Onnx.model_validate({"path": source}))
    settings = {"model": "m", "scheme": "int4", "skip": ["head"]}
    return run_stage(Quantize.model_validate(settings), m=model)


def test_a_bundle_tells_what_its_graph_takes(small: Artifact, run_stage: RunStage) -> None:
    bundle = run_stage(BundleStage(model="small"), small=small)
    manifest = verify_bundle(bundle.path)
    assert manifest["name"] == "small"
    assert manifest["gated"] is False
    assert manifest["model"]["kind"] == "onnx-graph"
    assert manifest["model"]["inputs"] == [
        {"name": "ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    ]
    assert manifest["model"]["precisions"]["float32"] == 48 * 32
    assert [record["kind"] for record in manifest["lineage"]] == ["onnx-graph"]
    assert {file["path"] for file in manifest["files"]} == {
        *("model.onnx", "model.onnx.data", "README.md")
    }
    card = (bundle.path / "README.md").read_text()
    assert "| input | ids | int64 | [batch, sequence] |" in card
    assert "| output | out | float32 | [batch, sequence, 32] |" in card
    assert "1,536 in float32" in card
    assert "lifecycle serve FOLDER" not in card


def test_equal_bundles_have_equal_bytes(small: Artifact, run_stage: RunStage) -> None:
    one, two = (run_stage(BundleStage(model="m"), m=small) for _ in range(2))
    assert one.digest == two.digest


def test_it_cannot_be_served(small: Artifact, run_stage: RunStage) -> None:
    bundle = run_stage(BundleStage(model="m", name="sentences"), m=small)
    with pytest.raises(EngineError, match="'sentences', which is no decoder: only language models"):
        open_service(bundle.path)


def test_generation_settings_are_refused(small: Artifact, run_stage: RunStage) -> None:
    stage = BundleStage.model_validate({"model": "m", "generation": {"temperature": 1}})
    with pytest.raises(StageError, match="'generation' is for decoders, but 'm'"):
        run_stage(stage, m=small)
