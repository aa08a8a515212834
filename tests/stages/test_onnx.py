"""A user's ONNX model in a recipe: its kind, its key, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifecycle.errors import RecipeError
from lifecycle.kinds import OnnxGraph, OnnxModel
from lifecycle.pipeline.artifact import Artifact
from lifecycle.pipeline.recipe import load
from lifecycle.stages.onnx import Onnx
from lifecycle.stages.quantize import Quantize
from tests.conftest import RunStage
from tests.graph import graphs
from tests.workshop import Workshop, statuses

RECIPE = """\
  model: {use: onnx, path: m.onnx}
  small: {use: quantize, model: model, scheme: int4, block_size: 32}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return graphs.write_encoder(tmp_path / "m.onnx", graphs.encoder_weights())


def test_a_graph_goes_through_a_recipe(source: Path, workshop: Workshop) -> None:
    run = workshop.run(RECIPE)
    assert statuses(run) == "model=done small=done", workshop.said
    assert run.stages["model"].metrics["inputs"] == ["ids"]
    assert {stage.kind for stage in run.stages.values()} == {"onnx-graph"}
    again = workshop.run(RECIPE)
    assert statuses(again) == "model=cached small=cached"


def test_other_weights_beside_the_file_are_another_key(source: Path, workshop: Workshop) -> None:
    workshop.run(RECIPE)
    weights = bytearray((source.parent / "m.bin").read_bytes())
    weights[-1] ^= 1
    (source.parent / "m.bin").write_bytes(weights)
    assert statuses(workshop.run(RECIPE)) == "model=done small=done"


def test_what_quantize_makes_is_of_the_kind_that_it_takes(source: Path, tmp_path: Path) -> None:
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    text = (
        "stages:\n  g: {use: onnx, path: m.onnx}\n  q: {use: quantize, model: g, scheme: int4}\n"
        "  hf: {use: checkpoint, path: decoder}\n  e: {use: export, model: hf}\n"
        "  d: {use: quantize, model: e, scheme: int4}\n"
    )
    path = tmp_path / "r.yaml"
    path.write_text(text)
    kinds = {name: entry.kind for name, entry in load(str(path)).entries.items()}
    assert (kinds["q"], kinds["d"]) == (OnnxGraph, OnnxModel)
    path.write_text(
        text + "  t: {use: corpus, path: m.onnx}\n  v: {use: evaluate, model: q, data: t}\n"
    )
    with pytest.raises(RecipeError, match="'q' makes an onnx-graph, this needs an .*onnx-model"):
        load(str(path))


def test_gptq_needs_a_decoder(source: Path, run_stage: RunStage) -> None:
    graph: Artifact = run_stage(Onnx.model_validate({"path": source}))
    settings = {"model": "g", "scheme": "int4", "method": "gptq", "calibration": "g"}
    with pytest.raises(Exception, match="walks the layers of a decoder, but 'g'"):
        run_stage(Quantize.model_validate(settings), g=graph)
