"""Graphs with slots for LoRA adapters, held to PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from lifecycle.engines import adapters
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.decoder import GRAPH
from lifecycle.evaluation.parity import measure_adapters
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.check import check_graph
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu
from tests.graph.models import MODELS, save_model


def _export(name: str, root: Path, slots: tuple[int, int] | None = (2, 6)) -> tuple[Path, Path]:
    model, out = root / "hf", root / "onnx"
    out.mkdir()
    save_model(name, model)
    export_decoder(model, out, Cpu(), slots=slots)
    return model, out


@pytest.mark.parametrize("name", MODELS)
def test_adapters_in_slots_equal_peft(name: str, tmp_path: Path) -> None:
    """Two in one batch, of different ranks and scales, beside a text without; whole and alone."""
    model, graph = _export(name, tmp_path)
    check_graph(graph)
    assert measure_adapters(model, graph) < 1e-4


def test_random_adapters_change_what_the_model_says(tmp_path: Path) -> None:
    """Or equality with PEFT would say nothing."""
    _, graph = _export("llama", tmp_path)
    from lifecycle.engines.ort import OnnxEngine
    from lifecycle.evaluation.random_adapter import write_random_adapter

    layout = AdapterLayout.load(graph)
    assert layout is not None
    write_random_adapter(tmp_path / "adapter", layout, seed=0)
    engine = OnnxEngine.open(graph)
    engine.load_adapter("one", tmp_path / "adapter")
    plain, adapted = engine.logits([1, 2, 3]), engine.logits([1, 2, 3], "one")
    assert np.abs(plain - adapted).max() > 0.1 * np.abs(plain).max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_the_plain_graph_is_that_of_an_export_without_slots(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, slots = _export(name, tmp_path / "a")
    _, plain = _export(name, tmp_path / "b", None)
    assert (slots / GRAPH).read_bytes() == (plain / GRAPH).read_bytes()
    assert (slots / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()
    assert not (plain / adapters.GRAPH).exists()
    assert AdapterLayout.load(plain) is None


@pytest.mark.parametrize("scheme", [Int8Rowwise(7), Blockwise(32), Blockwise(32, bits=8)])
def test_quantised_graphs_keep_their_slots(scheme: Scheme, tmp_path: Path) -> None:
    _, source = _export("llama-tied", tmp_path)
    out = tmp_path / "quantised"
    out.mkdir()
    quantize_graph(source, out, "int4", scheme)
    check_graph(out)
    names = [
        {i.name for i in onnx.load(source / f, load_external_data=False).graph.input}
        for f in _FILES
    ]
    kept = [
        {i.name for i in onnx.load(out / f, load_external_data=False).graph.input} for f in _FILES
    ]
    assert kept == names
    ops = {
        node.op_type
        for node in onnx.load(out / adapters.GRAPH, load_external_data=False).graph.node
    }
    assert "Gemm" not in ops


_FILES = (GRAPH, adapters.GRAPH)
