"""What is exchanged in the graphs that decoders of this project are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from lifecycle.engines.adapters import PLACES, TOKENS
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.native.swap import DOMAIN, swap
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import KvType, calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from tests.engines.conftest import Model


def operators(path: Path) -> Counter[tuple[str, str]]:
    """How many nodes of each kind a graph has once ours are in it."""
    graph = onnx.load_model_from_string(swap(path.read_bytes())).graph
    return Counter((node.domain, node.op_type) for node in graph.node)


@pytest.mark.parametrize(
    ("scheme", "product"),
    [
        (Int8Rowwise(8), "RowwiseMatMul"),
        (Blockwise(64), "MatMulNBits"),
        (Blockwise(32, bits=8, symmetric=False), "MatMulNBits"),
    ],
)
def test_all_that_takes_time_is_ours(
    random_model: Model, tmp_path: Path, scheme: Scheme, product: str
) -> None:
    quantize_graph(random_model.graph, tmp_path, "test", scheme)
    found = operators(tmp_path / "model.onnx")
    layers = found[DOMAIN, "PackedAttention"]
    assert layers > 1
    # Queries with keys and values, output, gate with up, down; and the head.
    assert found[DOMAIN, product] == 4 * layers + 1
    assert found[DOMAIN, "SkipNorm"] == 2 * layers
    assert {kind for domain, kind in found if domain == "com.microsoft"} <= {
        "RotaryEmbedding",
        "GatherBlockQuantized",
    }
    assert not {("", "Gemm"), ("", "QuantizeLinear"), ("", "GatherND")} & found.keys()
    assert ("", "Abs") not in found or scheme == Blockwise(64), (
        "but for scales, which are constants"
    )


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_attention_over_a_cache_of_integers_is_ours(
    random_model: Model, tmp_path: Path, kv_dtype: KvType
) -> None:
    info = DecoderInfo.load(random_model.graph)
    cache = calibrate_cache(Calibration(random_model.graph, [[3, 4, 5]]), info, kv_dtype)
    quantize_graph(random_model.graph, tmp_path, "test", None, cache=cache)
    attention = DOMAIN, f"PackedAttention{kv_dtype.capitalize()}"
    assert operators(tmp_path / "model.onnx")[attention] == info.num_layers
    model = onnx.load_model(tmp_path / "model.onnx", load_external_data=False)
    others = (tmp_path / "other.onnx", tmp_path / "none.onnx")
    for path in others:
        for node in model.graph.node:
            bits = [one for one in node.attribute if one.name == "kv_cache_bit_width"]
            for one in bits:
                one.i = {8: 4, 4: 8}[one.i] if path is others[0] else 2
        onnx.save_model(model, path)
        assert operators(path)[attention] == 0


def test_a_graph_in_floats_keeps_its_products(random_model: Model) -> None:
    found = operators(random_model.graph / "model.onnx")
    layers = found[DOMAIN, "PackedAttention"]
    assert found["", "Gemm"] == 4 * layers + 1 and found[DOMAIN, "Gate"] == layers


def bare(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(nodes, "bare", [], []))


def test_a_sum_of_one_is_left_as_it_is() -> None:
    nodes = [
        helper.make_node("Gather", ["x", TOKENS], ["a"]),
        helper.make_node("MatMul", ["a", "b"], ["c"]),
        helper.make_node("MatMul", ["c", "d"], ["e"]),
        helper.make_node("GatherND", ["e", PLACES], ["f"]),
        helper.make_node("Add", ["f"], ["g"]),
    ]
    found = onnx.load_from_string(swap(bare(nodes).SerializeToString()))
    assert [node.op_type for node in found.graph.node] == [node.op_type for node in nodes]


def test_a_float_that_is_none_is_no_model() -> None:
    alpha = onnx.AttributeProto(name="alpha", f=1.0)
    node = helper.make_node("QuickGelu", ["g"], ["h"], domain="com.microsoft")
    node.attribute.append(alpha)
    nodes = [
        helper.make_node("Split", ["x"], ["g", "u"], axis=-1),
        node,
        helper.make_node("Mul", ["h", "u"], ["y"]),
    ]
    model = bare(nodes).SerializeToString()
    # A varint of one byte, and a field that means nothing.
    written = b"\x15" + np.float32(1).tobytes()
    assert model.count(written) == 1
    with pytest.raises(ValueError, match="the attribute 'alpha' of '' is no float"):
        swap(model.replace(written, b"\x10\x01\x48\x81\x00"))
