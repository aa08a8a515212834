"""A quantised graph beside its float32 one: numbers against numpy, gates, the report in a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from lifecycle.errors import GateError, StageError
from lifecycle.pipeline.artifact import Artifact
from lifecycle.stages.arrays import ArraysStage
from lifecycle.stages.bundle import BundleStage
from lifecycle.stages.compare import Compare
from lifecycle.stages.onnx import Onnx
from lifecycle.stages.quantize import Quantize
from tests import tiny
from tests.conftest import RunStage
from tests.graph import graphs

IMAGES = np.random.default_rng(7).standard_normal((12, 3, 12, 12)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path, run_stage: RunStage) -> Artifact:
    source = graphs.write_classifier(tmp_path / "user" / "c.onnx", graphs.classifier_weights())
    return run_stage(Onnx.model_validate({"path": source}))


@pytest.fixture
def images(model: Artifact, tmp_path: Path, run_stage: RunStage) -> Artifact:
    np.savez(tmp_path / "images.npz", image=IMAGES)
    settings = {"model": "m", "path": tmp_path / "images.npz", "holdout": 4}
    return run_stage(ArraysStage.model_validate(settings), m=model)


@pytest.fixture
def static(model: Artifact, images: Artifact, run_stage: RunStage) -> Artifact:
    settings = {"model": "m", "scheme": "int8-static", "calibration": "i", "samples": 8}
    return run_stage(Quantize.model_validate(settings), m=model, i=images)


def compare(**settings) -> Compare:
    return Compare.model_validate({"model": "s", "reference": "m", "data": "i", **settings})


def test_the_numbers_are_numpys(
    model: Artifact, static: Artifact, images: Artifact, run_stage: RunStage
) -> None:
    assert (images.metrics["train"], images.metrics["test"]) == (8, 4)
    found = run_stage(compare(turns=2), s=static, m=model, i=images).metrics
    with np.load(images.path / "test.npz") as file:
        held_out = np.concatenate([file[name] for name in file.files])
    a, b = (
        ort.InferenceSession(folder.path / "model.onnx").run(None, {"image": held_out})[0]
        for folder in (static, model)
    )
    worst = (np.abs(a - b).max(axis=1) / np.abs(b).max(axis=1)).max()
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.isclose(found["max_relative_error"], worst, rtol=1e-4)
    assert np.isclose(found["cosine"], cosines.min(), rtol=1e-6)
    assert found["top1_agreement"] == (a.argmax(axis=1) == b.argmax(axis=1)).mean()
    sizes = [sum(f.stat().st_size for f in x.path.iterdir()) for x in (static, model)]
    assert np.isclose(found["size"], sizes[0] / sizes[1], atol=1e-4)
    assert found["speed_low"] <= found["speed"] <= found["speed_high"]


def test_a_passed_report_gates_a_bundle(
    model: Artifact, static: Artifact, images: Artifact, run_stage: RunStage
) -> None:
    gates = {"cosine": ">= 0.99", "top1_agreement": ">= 75 %"}
    report = run_stage(compare(gates=gates), s=static, m=model, i=images)
    again = run_stage(compare(gates=gates), s=static, m=model, i=images)
    assert report.digest == again.digest
    bundle = run_stage(BundleStage(model="s", report="r"), s=static, r=report)
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert manifest["gated"] is True
    assert "| cosine | 0.99" in (bundle.path / "README.md").read_text()


def test_a_failed_gate_stops(
    model: Artifact, static: Artifact, images: Artifact, run_stage: RunStage
) -> None:
    stage = compare(gates={"max_relative_error": "<= 1e-9", "cosine": ">= 0.5"})
    with pytest.raises(GateError, match=r"1 of 2.*max_relative_error is .*, bound <= 1e-9"):
        run_stage(stage, s=static, m=model, i=images)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"cosin": ">= 1"}, "unknown metric 'cosin'; did you mean 'cosine'"),
        ({"cosine": "1"}, "'cosine': '1' is no bound"),
        ({"speed": ">= 1"}, "'speed' is not measured: set turns"),
        ({"cosine": 0.99}, "'cosine': 0.99 does not say on which side"),
    ],
)
def test_gates_that_cannot_be_judged_are_refused(gates: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        compare(gates=gates)


def test_too_few_samples_are_counted(
    model: Artifact, images: Artifact, run_stage: RunStage
) -> None:
    settings = {"model": "m", "scheme": "int8-static", "calibration": "i", "samples": 9}
    with pytest.raises(StageError, match="'i' has 8 samples in its train.*set samples to 8"):
        run_stage(Quantize.model_validate(settings), m=model, i=images)


def test_static_needs_calibration() -> None:
    with pytest.raises(ValidationError, match="int8-static needs calibration"):
        Quantize.model_validate({"model": "m", "scheme": "int8-static"})


def test_texts_are_for_decoders(model: Artifact, run_stage: RunStage, tmp_path: Path) -> None:
    texts = tiny.text(tmp_path / "texts", ["one two"])
    with pytest.raises(StageError, match="'i' is of texts, which only decoders read"):
        run_stage(compare(), s=model, m=model, i=texts)


def test_a_decoder_is_compared_on_texts(
    learnt_onnx: Artifact, run_stage: RunStage, tmp_path: Path
) -> None:
    chats = tiny.conversations(tmp_path / "chats")
    (chats.path / "train.jsonl").write_text((chats.path / "test.jsonl").read_text())
    settings = {"model": "m", "scheme": "int8-static", "calibration": "i", "samples": 7}
    static = run_stage(Quantize.model_validate(settings), m=learnt_onnx, i=chats)
    assert static.kind == "onnx-model"
    found = run_stage(compare(), s=static, m=learnt_onnx, i=chats).metrics
    assert found["samples"] == 7
    assert found["cosine"] > 0.999
    # Of eight tokens; what training ends with depends on the processor, and two may be as likely as each other: what
    # all logits say is held to more above.
    assert found["top1_agreement"] >= 7 / 8


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_a_cache_of_integers_is_compared_with_one_of_floats(
    kv_cache: str, learnt_onnx: Artifact, run_stage: RunStage, tmp_path: Path
) -> None:
    chats = tiny.conversations(tmp_path / "chats")
    (chats.path / "train.jsonl").write_text((chats.path / "test.jsonl").read_text())
    settings = {"model": "m", "scheme": "fp32", "kv_cache": kv_cache}
    settings |= {"calibration": "i", "samples": 7}
    small = run_stage(Quantize.model_validate(settings), m=learnt_onnx, i=chats)
    found = run_stage(compare(), s=small, m=learnt_onnx, i=chats).metrics
    assert 0.5 < found["cosine"] < 1
    back = run_stage(compare(), s=learnt_onnx, m=small, i=chats).metrics
    assert np.isclose(back["cosine"], found["cosine"])
