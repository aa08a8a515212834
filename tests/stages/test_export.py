"""The stage: companions travel along, an unmerged adapter does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.ort import OnnxEngine
from lifecycle.errors import StageError
from lifecycle.evaluation.parity import measure_parity
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.kinds import HfModel
from lifecycle.pipeline.artifact import hash_tree
from lifecycle.stages.export import Export
from lifecycle.stages.quantize import Quantize
from tests.conftest import RunStage, as_artifact
from tests.graph.models import save_model

STAGE = Export.model_validate({"model": "base"})


@pytest.fixture
def base(tmp_path: Path) -> HfModel:
    """A random Llama with a tokeniser file."""
    save_model("llama-tied", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    model = as_artifact(HfModel, tmp_path / "hf")
    assert isinstance(model, HfModel)
    return model


def test_the_folder_is_complete_and_the_same_each_time(base: HfModel, run_stage: RunStage) -> None:
    one, two = run_stage(STAGE, base=base), run_stage(STAGE, base=base)
    names = {entry.path for entry in one.files}
    wanted = {"model.onnx", "model.onnx.data", "decoder.json", "tokenizer.json"}
    assert names == wanted | {"generation_config.json"}
    assert hash_tree(one.path) == hash_tree(two.path)
    assert one.metrics["bytes"] == (one.path / "model.onnx.data").stat().st_size


def test_an_adapter_must_be_merged_first(base: HfModel, run_stage: RunStage) -> None:
    (base.path / "adapter").mkdir()
    with pytest.raises(StageError, match="merge it first"):
        run_stage(STAGE, base=base)


def test_the_graph_is_compared_with_pytorch(base: HfModel, run_stage: RunStage) -> None:
    assert 0 < run_stage(STAGE, base=base).metrics["parity"] < 1e-5


def test_a_comparison_can_be_left_out_for_a_reason(base: HfModel, run_stage: RunStage) -> None:
    stage = Export.model_validate({"model": "base", "no_parity": "no PyTorch here"})
    metrics = run_stage(stage, base=base).metrics
    assert metrics["no_parity"] == "no PyTorch here"
    assert "parity" not in metrics


def test_a_graph_that_differs_is_no_artifact(base: HfModel, run_stage: RunStage) -> None:
    stage = Export.model_validate({"model": "base", "parity": 1e-12})
    with pytest.raises(StageError, match=r"differ by .* parity allows 1e-12 .*prefill.*rollback"):
        run_stage(stage, base=base)


def test_a_wrong_graph_is_noticed_in_every_way_of_feeding(tmp_path: Path) -> None:
    model = save_model("mistral-window", tmp_path)
    wider = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": 9}
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    export_decoder(tmp_path, tmp_path / "right", Cpu())
    (tmp_path / "config.json").write_text(json.dumps(wider))
    export_decoder(tmp_path, tmp_path / "wrong", Cpu())
    model.save_pretrained(tmp_path)
    assert max(measure_parity(tmp_path, tmp_path / "right").values()) < 1e-5
    assert min(measure_parity(tmp_path, tmp_path / "wrong").values()) > 1e-2


def test_too_little_memory_is_said_before_the_export(
    base: HfModel, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifecycle.engines.limits.available_memory", lambda: 1000)
    with pytest.raises(StageError, match=r"takes .* GiB of memory.*no_parity"):
        run_stage(STAGE, base=base)


def test_slots_are_exported_and_compared(base: HfModel, run_stage: RunStage) -> None:
    stage = Export.model_validate({"model": "base", "adapters": {"slots": 3, "rank": 4}})
    made = run_stage(stage, base=base)
    assert {"adapters.json", "adapters.onnx"} <= {entry.path for entry in made.files}
    assert made.metrics["parity"] < 1e-5
    quantized = run_stage(
        Quantize.model_validate({"model": "onnx", "scheme": "int8-rowwise"}), onnx=made
    )
    layout = AdapterLayout.load(quantized.path)
    assert layout is not None and layout == AdapterLayout.load(made.path)
    assert (layout.slots, layout.rank) == (3, 4)
    assert (quantized.path / "adapters.onnx").is_file()


def test_slots_that_differ_are_no_artifact(
    base: HfModel, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other updates than PEFT's, such as those of an adapter that is not scaled."""
    monkeypatch.setattr("lifecycle.engines.peft.PeftFolder._scale", lambda *_: 1.0)
    stage = Export.model_validate({"model": "base", "adapters": {"slots": 1, "rank": 4}})
    with pytest.raises(StageError, match=r"differ by .*adapters"):
        run_stage(stage, base=base)


def test_hidden_states_are_exported_compared_and_kept(base: HfModel, run_stage: RunStage) -> None:
    made = run_stage(
        Export.model_validate({"model": "base", "hidden_states": True, "parity": 1e-5}), base=base
    )
    assert "hidden.onnx" in {entry.path for entry in made.files}
    settings = {"model": "onnx", "scheme": "int8-rowwise"}
    quantized = run_stage(Quantize.model_validate(settings), onnx=made)
    assert OnnxEngine.open(quantized.path).embed([[5, 6, 7]]).shape == (1, 64)


def test_hidden_states_that_differ_are_no_artifact(
    base: HfModel, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read before the last norm, for one."""
    from lifecycle.graph import hidden

    monkeypatch.setattr(hidden, "WANTED", "embed_tokens")
    stage = Export.model_validate({"model": "base", "hidden_states": True})
    with pytest.raises(StageError, match=r"differ by .*hidden states"):
        run_stage(stage, base=base)
