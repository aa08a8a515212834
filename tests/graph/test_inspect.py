"""What a graph is made of, counted right for every way of storing its matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lifecycle.errors import EngineError, StageError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.inspect import Inspection, inspect_graph
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from tests.graph.models import VOCAB, export_quantized, save_model

HIDDEN, INNER, LAYERS = 64, 96, 2
LINEARS = LAYERS * (128 * HIDDEN + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
"""Weights of the products in the layers of the small Llama."""


def by_name(found: Inspection) -> dict[str, str]:
    return {matrix.name: matrix.precision for matrix in found.matrices}


def test_a_float_graph(tiny: Path) -> None:
    found = inspect_graph(tiny)
    assert found.parameters == LINEARS + VOCAB * HIDDEN
    assert found.multiply_adds == LINEARS + VOCAB * HIDDEN
    data = (tiny / "model.onnx.data").stat().st_size
    assert data <= found.bytes < data + 1000
    assert set(by_name(found).values()) == {"float32"}
    assert found.operators["com.microsoft.GroupQueryAttention"] == LAYERS
    assert found.inputs[0].name == "input_ids"
    assert found.inputs[0].shape == ("T",)
    assert found.outputs[-1].shape == ("L", VOCAB)


@pytest.mark.parametrize(
    ("scheme", "precision"), [(Int8Rowwise(7), "int8"), (Blockwise(32), "int4, blocks of 32")]
)
def test_tied_weights_in_fewer_bits_count_once(
    scheme: Scheme, precision: str, tiny: Path, tmp_path: Path
) -> None:
    quantize_graph(tiny, tmp_path, "test", scheme)
    found = inspect_graph(tmp_path)
    assert found.parameters == LINEARS + VOCAB * HIDDEN
    assert found.multiply_adds == LINEARS + VOCAB * HIDDEN
    assert set(by_name(found).values()) == {precision}
    data = (tmp_path / "model.onnx.data").stat().st_size
    # Up to 63 bytes before a tensor align it.
    assert data - 64 * 40 < found.bytes < data + 1000


def test_padding_of_blocks_is_no_parameter(tmp_path: Path) -> None:
    save_model("llama-narrow", tmp_path)
    found = inspect_graph(export_quantized(tmp_path, Blockwise(64)))
    shapes = {matrix.name: matrix.parameters for matrix in found.matrices}
    assert shapes["layers.0.mlp.gate_up_proj.product"] == 2 * 96 * 40


def test_only_the_experts_that_a_token_visits_count_as_work(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    out = export_quantized(tmp_path, Blockwise(32))
    mixture = next(m for m in inspect_graph(out).matrices if m.operator.endswith("QMoE"))
    assert mixture.parameters == 4 * 3 * HIDDEN * INNER
    assert mixture.multiply_adds == 2 * 3 * HIDDEN * INNER
    assert mixture.precision == "int4, blocks of 32"


def foreign(folder: Path) -> Path:
    """A graph by another tool: a convolution and a dequantised product."""
    constants = {
        "kernel": np.ones((4, 3, 2, 2), np.float32),
        "weights": np.ones((8, 5), np.int8),
        "scale": np.float32(0.5),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["features"], "conv"),
        helper.make_node("DequantizeLinear", ["weights", "scale"], ["floats"], "dequantize"),
        helper.make_node("MatMul", ["rows", "floats"], ["y"], "product"),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 8]),
        ],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5]),
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    file = folder / "foreign.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), file)
    return file


def test_a_graph_by_another_tool(tmp_path: Path) -> None:
    found = inspect_graph(foreign(tmp_path))
    assert by_name(found) == {"conv": "float32", "product": "int8"}
    assert (found.parameters, found.bytes) == (48 + 40, 4 * 48 + 40 + 4)
    assert found.opsets == {"": 21}


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"nothing\.onnx does not exist"):
        inspect_graph(tmp_path / "nothing.onnx")


def test_what_is_no_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("{}")
    with pytest.raises((StageError, EngineError), match=r"model\.onnx is .*no ONNX graph"):
        inspect_graph(tmp_path)


def test_a_graph_beyond_two_gigabytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    with file.open("wb") as stream:
        stream.truncate(2**31)
    with pytest.raises(EngineError, match="larger than 2 GiB.*external data"):
        inspect_graph(tmp_path)


def test_weights_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(48))
    inside = tmp_path / "inside"
    inside.mkdir()
    model = onnx.load(foreign(inside))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (inside / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="outside its own folder"):
        inspect_graph(inside)
