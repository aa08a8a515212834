"""The stage: schemes by name, options, metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from pydantic import ValidationError

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.native import library
from lifecycle.errors import StageError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.kinds import Conversations, HfModel, OnnxModel
from lifecycle.pipeline.artifact import Artifact
from lifecycle.stages.export import Export
from lifecycle.stages.quantize import Quantize
from lifecycle.stages.quantizing import emptied
from tests import tiny
from tests.conftest import RunStage, as_artifact
from tests.graph.models import save_model


def stage(**settings: Any) -> Quantize:
    return Quantize.model_validate({"model": "onnx", **settings})


@pytest.fixture
def exported(tmp_path: Path, run_stage: RunStage) -> Artifact:
    """A random Llama in float32 with a tokeniser file."""
    save_model("llama-tied", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    base = as_artifact(HfModel, tmp_path / "hf")
    return run_stage(Export.model_validate({"model": "base"}), base=base)


@pytest.mark.parametrize(
    ("scheme", "bits"), [("int8-rowwise", 9), ("int8", 10), ("int4", 6.5), ("bf16", 16.1)]
)
def test_a_scheme_shrinks_the_model(
    scheme: str, bits: float, exported: Artifact, run_stage: RunStage
) -> None:
    made = run_stage(stage(scheme=scheme), onnx=exported)
    assert DecoderInfo.load(made.path).scheme == scheme
    assert made.metrics["bits_per_weight"] < bits
    assert made.metrics["ratio"] < (bits + 2) / 32
    assert (made.path / "tokenizer.json").is_file()


def test_zero_points_take_a_little_more(exported: Artifact, run_stage: RunStage) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"symmetric": False},
        {"symmetric": False, "method": "hqq"},
    ]
    made = [run_stage(stage(scheme="int4", **o), onnx=exported) for o in options]
    bits = [m.metrics["bits_per_weight"] for m in made]
    assert bits[0] < bits[1] == bits[2]
    assert made[1].digest != made[2].digest


def test_int8_parts_and_skipped_parts_are_larger(exported: Artifact, run_stage: RunStage) -> None:
    sizes = [
        run_stage(stage(scheme="int4", **options), onnx=exported).metrics["bytes"]
        for options in ({"int8": []}, {}, {"int8": ["lm_head", "*.down_proj"]}, {"skip": ["*"]})
    ]
    assert sizes == sorted(set(sizes))


def test_a_mistyped_scheme_names_the_near_one() -> None:
    with pytest.raises(ValidationError, match="'int8-rowise'; did you mean 'int8-rowwise'"):
        stage(scheme="int8-rowise")


def test_a_target_may_not_run_a_scheme(exported: Artifact, run_stage: RunStage) -> None:
    path = exported.path / "decoder.json"
    path.write_text(path.read_text().replace('"int4"', '"int2"'))
    with pytest.raises(StageError, match="'int4' does not run on target 'cpu'"):
        run_stage(stage(scheme="int4"), onnx=as_artifact(OnnxModel, exported.path))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"scheme": "int8-rowwise", "method": "gptq", "calibration": "c"},
            "gptq.*not for int8-rowwise",
        ),
        ({"scheme": "int8-rowwise", "symmetric": False}, "symmetric: false.*not for int8-rowwise"),
        ({"scheme": "fp16", "block_size": 32}, "block_size: 32 .*not for fp16"),
        ({"scheme": "int8-rowwise", "block_size": 64}, "block_size: 64 .*not for int8-rowwise"),
        ({"scheme": "int8", "weight_bits": 7}, "weight_bits: 7 is for .*not for int8"),
        (
            {"scheme": "int8-rowwise", "int8": []},
            r"int8: \[\] is for the scheme int4, not for int8-r",
        ),
        ({"scheme": "mixed", "int8": ["lm_head", "*.down_proj"]}, r"int8: .*down_proj\"\] is for"),
        ({"scheme": "int8-rowwise", "calibrate": "entropy"}, "for the scheme int8-static, not for"),
        ({"scheme": "int4", "percentile": 99.0}, "percentile: 99.0 is for .*int8-static, not for"),
        (
            {"scheme": "int8-static", "percentile": 99.0, "calibration": "c"},
            "percentile is for calibrate: percentile, not for minmax",
        ),
        ({"scheme": "int4", "method": "hqq"}, "set symmetric: false"),
        ({"scheme": "int4", "method": "gptq"}, "gptq needs calibration"),
        ({"scheme": "int4", "method": "awq"}, "awq needs calibration"),
        ({"scheme": "int4", "calibration": "c"}, "calibration is only read for.* smooth"),
        ({"scheme": "mixed", "calibration": "c"}, "mixed and budget go together"),
        ({"scheme": "int4", "budget": {"kl": 0.1}}, "mixed and budget go together"),
        ({"scheme": "mixed", "budget": {"kl": 0.1}}, "mixed needs calibration"),
        ({"scheme": "mixed", "calibration": "c", "budget": {}}, "either bits_per_weight or kl"),
        ({"scheme": "int4", "distill": {}}, "distill needs calibration"),
        ({"scheme": "int4", "distill": {"steps": 0}, "calibration": "c"}, "distill.steps"),
        (
            {"scheme": "auto", "distill": {}, "data": "c", "bound": {"kl": "<= 1"}},
            "distill is not for all candidates",
        ),
        (
            {"scheme": "int8-rowwise", "distill": {}, "calibration": "c"},
            "distill is for the schemes int4 and mixed, not for int8-rowwise",
        ),
        ({"scheme": "int4", "kv_cache": "int8"}, "kv_cache needs calibration"),
        ({"scheme": "int4", "smooth": 0.5, "calibration": "c"}, "for the scheme int8-rowwise"),
        ({"scheme": "int8-rowwise", "smooth": 0.5}, "smooth needs calibration"),
        ({"scheme": "int8-rowwise", "smooth": 1.5, "calibration": "c"}, "smooth"),
        ({"scheme": "fp32"}, "changes no weights; set kv_cache"),
        ({"scheme": "fp32", "kv_cache": "int2", "calibration": "c"}, "kv_cache"),
        ({"scheme": "fp16", "method": "gptq", "calibration": "c"}, "not for fp16"),
        ({"scheme": "int4", "block_size": 48}, "block_size"),
        ({"scheme": "int4", "method": "gtpq"}, "method"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        stage(**settings)


def test_a_scheme_takes_8_bits_where_the_host_adds_them_exactly(
    exported: Artifact, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(flags: set[str], machine: str = "x86_64", **settings: Any) -> Artifact:
        monkeypatch.setattr(library, "instruction_sets", lambda: frozenset(flags))
        monkeypatch.setattr("platform.machine", lambda: machine)
        return run_stage(stage(scheme="int8-rowwise", **settings), onnx=exported)

    seven, eight = made(set(), weight_bits=7), made(set(), weight_bits=8)
    assert seven.digest != eight.digest
    assert made({"avx2", "fma"}).digest == seven.digest
    assert made({"avx2", "avx_vnni"}).digest == eight.digest
    assert made({"avx512f", "avx512_vnni"}).digest == eight.digest
    assert made(set(), "aarch64").digest == eight.digest


def test_what_the_host_chooses_is_part_of_what_a_result_is_kept_under(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for is_exact, bits in ((True, 8), (False, 7)):
        monkeypatch.setattr(library, "adds_bytes_exactly", lambda found=is_exact: found)
        for scheme, key in (("int8-rowwise", {"weight_bits": bits}), ("int8", {}), ("fp16", {})):
            assert stage(scheme=scheme).fingerprint() == key
        assert stage(scheme="int8-rowwise", weight_bits=7).fingerprint() == {}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scheme": "int8-rowwise"}, "in 8 bits by blocks of 32"),
        (
            {"scheme": "mixed", "budget": {"kl": 1}, "calibration": "c", "samples": 4},
            "only other matrices get more",
        ),
        ({"scheme": "int4", "method": "gptq", "calibration": "c", "samples": 4}, None),
        ({"scheme": "int4"}, None),
    ],
)
def test_it_is_told_how_experts_are_rounded(
    settings: dict[str, Any],
    told: str | None,
    tmp_path: Path,
    calibration: Artifact,
    run_stage: RunStage,
) -> None:
    made = run_stage(stage(**settings), onnx=exported_mixture(tmp_path), c=calibration)
    lines = [line for line in made.ctx.progress.lines if "experts of 'onnx'" in line]
    assert [told in line for line in lines] == ([True] if told else [])


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_it_is_told_of_how_many_experts_too_little_is_known(
    method: str, tmp_path: Path, calibration: Artifact, run_stage: RunStage
) -> None:
    settings = {"scheme": "int4", "method": method, "calibration": "c", "samples": 1}
    made = run_stage(stage(**settings), onnx=exported_mixture(tmp_path), c=calibration)
    (line,) = (line for line in made.ctx.progress.lines if "visited by" in line)
    # Two layers of four experts, of which a short text visits all with fewer tokens than there are channels.
    none, few = map(int, re.findall(r"(\d+) (?:are visited by no|by fewer)", line))
    assert line.startswith("of 8 experts") and none + few == 8 and few > 0


def exported_mixture(folder: Path) -> Artifact:
    save_model("mixtral", folder / "hf")
    (folder / "onnx").mkdir()
    export_decoder(folder / "hf", folder / "onnx", Cpu())
    tiny.write_tokenizer(folder / "onnx")
    return as_artifact(OnnxModel, folder / "onnx")


@pytest.fixture
def calibration(tmp_path: Path) -> Artifact:
    """The conversations that `tests.tiny` trains on."""
    folder = tiny.write_rows(tmp_path / "data", tiny.ROWS)
    (folder / "train.jsonl").write_text((folder / "test.jsonl").read_text())
    return as_artifact(Conversations, folder)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_methods_read_the_calibration(
    method: str,
    symmetric: bool,
    learnt_onnx: OnnxModel,
    calibration: Artifact,
    run_stage: RunStage,
) -> None:
    settings = {"scheme": "int4", "calibration": "c", "method": method, "samples": 4}
    settings |= {"symmetric": symmetric}
    made = run_stage(stage(**settings), onnx=learnt_onnx, c=calibration)
    plain = run_stage(stage(scheme="int4", symmetric=symmetric), onnx=learnt_onnx)
    assert made.metrics["bytes"] == plain.metrics["bytes"]
    assert made.digest != plain.digest


def test_distillation_says_what_it_gained(
    learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings: dict[str, Any] = {"scheme": "int4", "calibration": "c", "block_size": 64}
    # What `gptq`, and smaller blocks, leave of texts that the model knows by heart is next to nothing.
    settings |= {"method": "awq", "samples": 4, "sample_length": 48}
    distill = {"steps": 20, "batch_size": 4, "learning_rate": 3e-4}
    plain = run_stage(stage(**settings), onnx=learnt_onnx, c=calibration)
    trained = run_stage(stage(**settings, distill=distill), onnx=learnt_onnx, c=calibration)
    assert trained.metrics["bits_per_weight"] == plain.metrics["bits_per_weight"]
    assert trained.metrics["kl_after"] < trained.metrics["kl_before"]
    report = json.loads((trained.path / "distillation.json").read_text())
    assert report == {
        "kl_before": trained.metrics["kl_before"],
        "kl_after": trained.metrics["kl_after"],
        "steps": 20,
    }
    again = run_stage(stage(**settings, distill=distill), onnx=learnt_onnx, c=calibration)
    assert again.digest == trained.digest != plain.digest


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_cache_is_measured_on_what_was_trained(
    method: str, learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings: dict[str, Any] = {"scheme": "int4", "calibration": "c", "samples": 4}
    settings |= {"sample_length": 48, "method": method, "kv_cache": "int8"}
    distill = {"steps": 20, "batch_size": 4, "learning_rate": 3e-4, "samples": 7}
    made = [
        run_stage(stage(**settings, **more), onnx=learnt_onnx, c=calibration)
        for more in ({}, {"distill": distill})
    ]
    scales = [cache_scales(each.path) for each in made]
    assert scales[0].keys() == scales[1].keys() and scales[0]
    assert any((scales[0][name] != scales[1][name]).any() for name in scales[0])


def cache_scales(folder: Path) -> dict[str, NDArray[np.float32]]:
    graph = onnx.load(folder / "model.onnx").graph
    names = {n for node in graph.node if node.op_type == "GroupQueryAttention" for n in node.input}
    return {
        t.name: numpy_helper.to_array(t)
        for t in graph.initializer
        if t.name in names and "scale" in t.name
    }


def test_distillation_needs_something_to_train(
    learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings: dict[str, Any] = {"scheme": "int4", "calibration": "c", "distill": {"samples": 2}}
    with pytest.raises(StageError, match="no matrix is stored in 4 bits"):
        run_stage(stage(**settings, int8=["*"]), onnx=learnt_onnx, c=calibration)


def test_what_a_killed_run_left_is_no_hindrance(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "rounded").write_bytes(b"half")
    with pytest.raises(KeyError), emptied(work) as folder:
        assert folder == work and not any(work.iterdir())
        (work / "rounded").write_bytes(b"more")
        raise KeyError
    assert not work.exists()


def test_adapters_would_read_what_distillation_changes(
    tmp_path: Path, calibration: Artifact, run_stage: RunStage
) -> None:
    save_model("llama", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    export = Export.model_validate({"model": "base", "adapters": {"slots": 2, "rank": 4}})
    made = run_stage(export, base=as_artifact(HfModel, tmp_path / "hf"))
    with pytest.raises(StageError, match="distill trains what the adapters of 'onnx' read"):
        run_stage(stage(scheme="int4", distill={}, calibration="c"), onnx=made, c=calibration)


def test_smoothing_reads_the_calibration(
    learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings = {"scheme": "int8-rowwise", "smooth": 0.5, "calibration": "c", "samples": 4}
    made = [run_stage(stage(**settings), onnx=learnt_onnx, c=calibration) for _ in range(2)]
    plain = run_stage(stage(scheme="int8-rowwise"), onnx=learnt_onnx)
    assert made[0].digest == made[1].digest != plain.digest


@pytest.mark.parametrize(("scheme", "kv_cache"), [("fp32", "int8"), ("int4", "int4")])
def test_a_cache_is_measured_on_the_calibration(
    scheme: str, kv_cache: str, learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings = {"scheme": scheme, "kv_cache": kv_cache, "calibration": "c", "samples": 4}
    made = [run_stage(stage(**settings), onnx=learnt_onnx, c=calibration) for _ in range(2)]
    assert DecoderInfo.load(made[0].path).kv_dtype == kv_cache
    assert made[0].digest == made[1].digest


def test_a_target_may_not_run_a_cache(
    exported: Artifact, calibration: Artifact, run_stage: RunStage
) -> None:
    path = exported.path / "decoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kv_dtypes": ["float32"]}))
    wanted = stage(scheme="fp32", kv_cache="int4", calibration="c")
    with pytest.raises(StageError, match="kv_cache 'int4' does not run on target 'cpu'"):
        run_stage(wanted, onnx=as_artifact(OnnxModel, exported.path), c=calibration)


def test_too_few_texts_for_calibration_are_counted(
    learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings = {"scheme": "int4", "calibration": "c", "method": "gptq", "samples": 5000}
    with pytest.raises(StageError, match=r"'c' has \d+ texts.*5000 are asked.*set samples to \d+"):
        run_stage(stage(**settings), onnx=learnt_onnx, c=calibration)


def test_mixed_keeps_to_its_budget(
    learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings: dict[str, Any] = {"scheme": "mixed", "calibration": "c", "samples": 4}
    settings["block_size"] = 16
    found: list[list[int]] = []
    for budget in ({"bits_per_weight": 7.2}, {"kl": 1e-9}, {"kl": 100}):
        made = run_stage(stage(**settings, budget=budget), onnx=learnt_onnx, c=calibration)
        assert made.metrics["bits_per_weight"] <= budget.get("bits_per_weight", 9)
        content = json.loads((made.path / "sensitivity.json").read_text())
        found.append([row["bits"] for row in content["matrices"]])
        assert content["expected_kl"] <= budget.get("kl", 9)
    some, fine, coarse = found
    assert set(some) == {4, 8} and set(fine) == {8} and set(coarse) == {4}


def test_a_budget_that_no_choice_meets_is_refused(
    learnt_onnx: OnnxModel, calibration: Artifact, run_stage: RunStage
) -> None:
    settings = {"scheme": "mixed", "calibration": "c", "samples": 4}
    with pytest.raises(StageError, match=r"budget: 3 bits per weight are fewer than the \d\.\d+"):
        run_stage(stage(**settings, budget={"bits_per_weight": 3}), onnx=learnt_onnx, c=calibration)
