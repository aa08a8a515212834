"""A target is a small plug-in; what it says is what the export does."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from pydantic import ValidationError

from lifecycle.graph.targets import Cpu
from lifecycle.kinds import HfModel
from lifecycle.stages.export import Export
from tests.conftest import RunStage, as_artifact
from tests.graph.models import save_model

PLUGIN = '''
from typing import ClassVar

from lifecycle.graph.targets import Target


class Npu(Target):
    """An accelerator whose attention does not rotate."""

    use: str = "./npu.py:Npu"
    providers: ClassVar[tuple[str, ...]] = ("NpuExecutionProvider", "CPUExecutionProvider")
'''


def test_a_target_from_a_file_shapes_the_graph(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "npu.py").write_text(PLUGIN)
    save_model("llama", tmp_path / "hf")
    settings = {"model": "base", "target": "./npu.py:Npu"}
    stage = Export.model_validate(settings, context={"roots": [tmp_path]})
    made = run_stage(stage, base=as_artifact(HfModel, tmp_path / "hf"))
    graph = onnx.load(made.path / "model.onnx", load_external_data=False).graph
    assert "position_ids" in {value.name for value in graph.input}
    assert "NpuExecutionProvider" in (made.path / "decoder.json").read_text()


def test_a_mistyped_target_names_the_near_one() -> None:
    with pytest.raises(ValidationError, match="did you mean 'cpu'"):
        Export.model_validate({"model": "base", "target": "cpuu"})


@pytest.mark.parametrize(("size", "fused"), [(16, True), (80, True), (8, False), (24, False)])
def test_cpu_attention_rotates_heads_of_whole_sixteens(size: int, fused: bool) -> None:
    assert Cpu().fuses_rotary(size) is fused
