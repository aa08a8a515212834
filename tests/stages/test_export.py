"""The stage: companions travel along, an unmerged adapter does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifecycle.errors import StageError
from lifecycle.kinds import HfModel
from lifecycle.pipeline.artifact import hash_tree
from lifecycle.stages.export import Export
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
