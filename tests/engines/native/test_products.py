"""Products with weights in integers: what they give, and that no row depends on another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from lifecycle.engines.native.sampling import native_passes
from lifecycle.engines.native.swap import DOMAIN, LOGITS, swap
from lifecycle.graph.rounding import Grid, least_squares, quantize
from tests.engines.native.conftest import build, run
from tests.exact import MOST

Floats = NDArray[np.float32]
SHAPES = [(1, 64, 48), (2, 576, 960), (3, 20, 5), (7, 130, 17), (16, 96, 200), (61, 256, 80)]
"""Rows, depth and columns: whole tiles and parts of them."""


def rowwise_model(
    weight: NDArray[np.int8], scale: Floats, transposed: bool, bias: Floats | None = None
) -> bytes:
    """The nodes that `int8-rowwise` makes of a product."""
    last = {"last": np.array([-1], np.int64)}
    constants = {"int8.step": np.array(1 / 127, np.float32), "int8.zero": np.array(128, np.uint8)}
    nodes = [
        helper.make_node("Abs", ["x"], ["magnitude"]),
        helper.make_node("ReduceMax", ["magnitude", "last"], ["largest"]),
        helper.make_node("Div", ["x", "largest"], ["unit"]),
        helper.make_node("QuantizeLinear", ["unit", "int8.step", "int8.zero"], ["rows"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["rows", "weight", "int8.step", "scale", "int8.zero"],
            ["product"],
            domain="com.microsoft",
        ),
        helper.make_node("Mul", ["product", "largest"], ["y"]),
    ]
    stored = weight
    if transposed:
        stored = np.ascontiguousarray(weight.T)
        nodes.insert(0, helper.make_node("Transpose", ["table"], ["weight"], perm=[1, 0]))
    weights: dict[str, Any] = {"table" if transposed else "weight": stored, "scale": scale}
    x = np.zeros((1, 1), np.float32)
    if bias is not None:
        nodes[-1].output[0] = "scaled"
        nodes.append(helper.make_node("Add", ["scaled", "bias"], ["y"]))
        weights["bias"] = bias
    return build(nodes, {"x": x}, {**weights, **constants, **last}, {"y": x})


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rowwise_product_has_the_bits_of_the_nodes_it_replaces(
    kernels: Path, shape: tuple[int, int, int], transposed: bool, has_bias: bool
) -> None:
    rows, depth, columns = shape
    rng = np.random.default_rng(depth)
    weight = rng.integers(-MOST, MOST + 1, (depth, columns)).astype(np.int8)
    scale = rng.uniform(1e-3, 1, columns).astype(np.float32)
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    x[0, 0] = 300
    bias = rng.standard_normal(columns).astype(np.float32) if has_bias else None
    model = rowwise_model(weight, scale, transposed, bias)
    swapped = swap(model)
    assert b"RowwiseMatMul" in swapped and b"QuantizeLinear" not in swapped
    assert [node.op_type for node in onnx.load_from_string(swapped).graph.node] == ["RowwiseMatMul"]
    (expected,), (found,) = run(model, None, {"x": x}), run(swapped, kernels, {"x": x})
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("least", "most"), [(-128, 127), (-127, 127), (-64, 63), (-64, 64), (-65, 63), (-63, 63)]
)
@pytest.mark.parametrize("rows", [4, 20])
def test_the_largest_sums_of_a_rowwise_product_are_exact(
    kernels: Path, rows: int, least: int, most: int
) -> None:
    """Of two products of bytes 16 bits may have no room."""
    signs = np.where(np.random.default_rng(0).random((rows, 200)) < 0.5, -1, 1)
    signs[0] = 1
    weight = np.full((200, 40), most, np.int8)
    weight[:, 1::2] = least
    weight[::3, 5] = 0
    model = rowwise_model(weight, np.full(40, 127, np.float32), False)
    (found,) = run(swap(model), kernels, {"x": signs.astype(np.float32)})
    sums = 127 * signs @ weight.astype(int)
    assert np.array_equal(
        found, (sums * (np.float32(1 / 127) * np.float32(127))).astype(np.float32)
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 40), (5, 1)])
def test_what_is_added_in_another_shape_is_no_bias(kernels: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    added = rng.standard_normal(shape).astype(np.float32)
    scale = rng.uniform(1e-3, 1, 40).astype(np.float32)
    weight = rng.integers(-MOST, MOST + 1, (64, 40)).astype(np.int8)
    model = rowwise_model(weight, scale, False, added)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    (expected,), (found,) = run(model, None, {"x": x}), run(swap(model), kernels, {"x": x})
    assert np.array_equal(found, expected)


def test_what_is_no_number_stays_in_its_row(kernels: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    x[1, 3], x[2, 60], x[3] = np.nan, np.inf, 0
    model = rowwise_model(np.ones((64, 40), np.int8), np.ones(40, np.float32), False)
    (found,) = run(swap(model), kernels, {"x": x})
    assert np.isnan(found[1:3]).all() and (found[3] == 0).all()
    assert np.isfinite(found[[0, 4]]).all()
    model = blocks_model(Grid(32), rng.standard_normal((40, 64)).astype(np.float32))[0]
    (found,) = run(swap(model), kernels, {"x": x})
    assert np.isnan(found[1:3]).all() and (found[3] == 0).all()
    assert np.isfinite(found[[0, 4]]).all()


def test_steps_without_rows_give_none(kernels: Path) -> None:
    model = rowwise_model(np.ones((64, 40), np.int8), np.ones(40, np.float32), False)
    (found,) = run(swap(model), kernels, {"x": np.zeros((0, 64), np.float32)})
    assert found.shape == (0, 40)


def test_a_value_that_others_read_stays(kernels: Path) -> None:
    model = rowwise_model(np.ones((64, 40), np.int8), np.ones(40, np.float32), False)

    graph = onnx.load_from_string(model)
    graph.graph.node.append(helper.make_node("Identity", ["unit"], ["seen"]))
    graph.graph.output.append(
        helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, [None, None])
    )
    swapped = swap(graph.SerializeToString())
    assert b"RowwiseMatMul" not in swapped
    x = np.ones((2, 64), np.float32)
    assert (run(swapped, kernels, {"x": x})[1] == 1).all()


def blocks_model(
    grid: Grid, weight: Floats, bias: Floats | None = None, accuracy_level: int = 4
) -> tuple[bytes, Floats]:
    """A product of blocks, and the weights that it has [columns, depth]."""
    columns, depth = weight.shape
    blocks = quantize(weight, grid, least_squares)
    packed = blocks.pack()
    weights: dict[str, Any] = {"values": packed.values, "scales": packed.scales.floats()}
    inputs = ["x", "values", "scales", "", "", ""]
    if packed.zeros is not None:
        weights["zeros"], inputs[3] = packed.zeros, "zeros"
    if bias is not None:
        weights["bias"], inputs[5] = bias, "bias"
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=depth, N=columns, bits=grid.bits,
        block_size=grid.block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    x = np.zeros((1, 1), np.float32)
    return build([node], {"x": x}, weights, {"y": x}), blocks.floats(depth)


def by_hand(x: Floats, weight: Floats, block: int) -> Floats:
    """The product with each block of a row rounded to 8 bits, in float64."""
    rows, depth = x.shape
    padded = np.zeros((rows, -(-depth // block) * block))
    padded[:, :depth] = x
    parts = padded.reshape(rows, -1, block)
    step = np.abs(parts).max(axis=-1, keepdims=True) / 127
    step[step == 0] = 1
    rounded = (np.rint(parts / step) * step).reshape(rows, -1)[:, :depth]
    return (rounded @ weight.T.astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_products_of_blocks(kernels: Path, block: int, bits: int, symmetric: bool) -> None:
    for rows, depth, columns in SHAPES:
        rng = np.random.default_rng(block + depth)
        weight = rng.standard_normal((columns, depth)).astype(np.float32)
        bias = rng.standard_normal(columns).astype(np.float32) if rows % 2 else None
        model, stored = blocks_model(Grid(block, bits, symmetric), weight, bias)
        x = rng.standard_normal((rows, depth)).astype(np.float32)
        (found,) = run(swap(model), kernels, {"x": x})
        expected = by_hand(x, stored, block) + (0 if bias is None else bias)
        # A value halfway between two steps may go either way.
        np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
        assert np.abs(found - expected).mean() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [8, 16, 72, 128, 256])
def test_the_largest_sums_of_blocks_are_exact(
    kernels: Path, block: int, bits: int, symmetric: bool
) -> None:
    rng = np.random.default_rng(block)
    weight = rng.choice([0.0, 1.0], (40, 300)).astype(np.float32)
    weight[1::2] *= -1
    weight[0], weight[1] = 1, -1
    model, stored = blocks_model(Grid(block, bits, symmetric), weight)
    x = np.ones((3, 300), np.float32)
    x[1], x[2, ::2] = -1, -1
    (found,) = run(swap(model), kernels, {"x": x})
    np.testing.assert_allclose(found, x @ stored.T, atol=1e-3)


@pytest.mark.parametrize("block", [16, 64, None])
def test_a_row_gets_the_same_bits_alone_and_among_others(kernels: Path, block: int | None) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((96, 256)).astype(np.float32)
    if block is None:
        stored = np.rint(weight.T * 30).astype(np.int8)
        model = rowwise_model(np.ascontiguousarray(stored), np.ones(96, np.float32), False)
    else:
        model, _ = blocks_model(Grid(block), weight)
    x = rng.standard_normal((53, 256)).astype(np.float32)
    (together,) = run(swap(model), kernels, {"x": x})
    for threads in (1, 2):
        for count in (1, 2, 5, 6, 7, 12, 50):
            (alone,) = run(swap(model), kernels, {"x": x[:count]}, threads)
            assert np.array_equal(alone, together[:count])


@pytest.mark.parametrize("most", [63, 127])
def test_matrices_have_the_bits_of_vectors(in_vectors: Path, in_matrices: Path, most: int) -> None:
    """Sums of integers are exact, in whatever order, of depths that fill no whole matrix too."""
    rng = np.random.default_rng(3)
    shapes = [(12, 64, 48), (16, 72, 40), (33, 576, 100), (200, 1544, 48)]
    # So deep that rows come in parts, the last of them a few.
    for rows, depth, columns in [*shapes, (49, 16448, 48), (65, 16448, 48)]:
        weight = rng.integers(-most, most + 1, (depth, columns)).astype(np.int8)
        scale, bias = rng.uniform(1e-3, 1, (2, columns)).astype(np.float32)
        model = swap(rowwise_model(weight, scale, False, bias))
        x = rng.standard_normal((rows, depth)).astype(np.float32)
        (expected,) = run(model, in_vectors, {"x": x})
        (found,) = run(model, in_matrices, {"x": x})
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 136])
def test_matrices_have_the_bits_of_vectors_in_blocks(
    in_vectors: Path, in_matrices: Path, block: int, bits: int, symmetric: bool
) -> None:
    rng = np.random.default_rng(block)
    for rows, depth, columns in ((32, 64, 48), (50, 300, 40), (97, 576, 100)):
        weight = rng.standard_normal((columns, depth)).astype(np.float32)
        bias = rng.standard_normal(columns).astype(np.float32)
        model = swap(blocks_model(Grid(block, bits, symmetric), weight, bias)[0])
        x = rng.standard_normal((rows, depth)).astype(np.float32)
        (expected,) = run(model, in_vectors, {"x": x})
        (found,) = run(model, in_matrices, {"x": x})
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("largest", [1e-40, 1e-30, 1.0, 3e38])
def test_rows_are_rounded_as_nodes_round_them(kernels: Path, largest: float) -> None:
    """Also where a value lies near the middle of two steps, and where steps are no normal numbers."""
    halves = ((np.arange(-127, 127) + 0.5) / 127 * largest).astype(np.float32)
    near = [np.nextafter(halves, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([halves, *near, np.float32([largest, 0])])
    model = rowwise_model(np.eye(x.size, dtype=np.int8), np.ones(x.size, np.float32), False)
    given = {"x": x[None]}
    (expected,), (found,) = run(model, None, given), run(swap(model), kernels, given)
    assert np.array_equal(found, expected)


def test_other_products_stay_as_they_are() -> None:
    weight = np.ones((16, 64), np.float32)
    exact, _ = blocks_model(Grid(32), weight, accuracy_level=0)
    x = {"x": np.ones((1, 64), np.float32)}
    assert run(swap(exact), None, x)[0].shape == (1, 16)
    ours = swap(blocks_model(Grid(32), weight)[0])
    with pytest.raises(Exception, match=f"{DOMAIN}:MatMulNBits"):
        run(ours, None, x)


@pytest.mark.parametrize("width", [64, 20])
def test_a_gate_has_the_same_bits_inside_a_product_and_before_it(kernels: Path, width: int) -> None:
    """It is inside where nothing else reads it; with adapters something does, and without has to give the same."""
    rng = np.random.default_rng(3)
    product, _ = blocks_model(Grid(32), rng.standard_normal((48, width)).astype(np.float32))
    model = onnx.load_from_string(product)
    halves = onnx.numpy_helper.from_array(np.array([width, width], np.int64), "halves")
    model.graph.initializer.append(halves)
    gate = [
        helper.make_node("Split", ["both", "halves"], ["gate", "up"], axis=-1),
        helper.make_node("QuickGelu", ["gate"], ["act"], domain="com.microsoft", alpha=1.0),
        helper.make_node("Mul", ["act", "up"], ["x"]),
    ]
    nodes = [*gate, *model.graph.node]
    del model.graph.node[:], model.graph.input[0].type.tensor_type.shape.dim[1:]
    model.graph.input[0].name = "both"
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 2 * width
    model.graph.node.extend(nodes)
    alone = model.SerializeToString()
    model.graph.output.append(
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, None])
    )
    watched = model.SerializeToString()
    assert b"gated" in swap(alone) and b"QuickGelu" not in swap(watched)
    both = rng.standard_normal((7, 2 * width)).astype(np.float32) * 4
    both[2, 3], both[3, 5], both[4, 0] = 200, -200, np.nan
    (y,) = run(swap(alone), kernels, {"both": both})
    same, x = run(swap(watched), kernels, {"both": both})
    assert np.array_equal(y, same, equal_nan=True)
    gate_half, up_half = np.split(both.astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):
        expected = gate_half / (1 + np.exp(-gate_half)) * up_half
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-30)


def as_head(model: bytes) -> bytes:
    """The same model, whose output is logits."""
    found = onnx.load_model_from_string(model)
    for node in found.graph.node:
        node.output[:] = [LOGITS if name == "y" else name for name in node.output]
    found.graph.output[0].name = LOGITS
    return found.SerializeToString()


@pytest.mark.parametrize("columns", [1, 63, 64, 1000, 20_000])
@pytest.mark.parametrize("rows", [1, 3, 13, 50])
@pytest.mark.parametrize("kind", ["rowwise", "blocks"])
def test_a_head_tells_the_largest_of_its_columns(
    kernels: Path, kind: str, rows: int, columns: int
) -> None:
    rng = np.random.default_rng(rows)
    if kind == "rowwise":
        weight = rng.integers(-127, 128, (64, columns)).astype(np.int8)
        model = rowwise_model(weight, rng.uniform(0.1, 1, columns).astype(np.float32), False)
    else:
        model = blocks_model(Grid(32), rng.standard_normal((columns, 64)).astype(np.float32))[0]
    x = rng.standard_normal((rows, 64)).astype(np.float32)
    x[rows // 2, 5] = np.nan
    logits, tops = run(swap(as_head(model)), kernels, {"x": x})
    wanted = np.stack([logits[:, i : i + 64].max(axis=1) for i in range(0, columns, 64)], axis=1)
    assert np.isnan(tops[rows // 2]).any()
    others = np.arange(rows) != rows // 2
    assert np.array_equal(tops[others], wanted[others])
    place = logits.ctypes.data, tops.ctypes.data
    known = native_passes(kernels, lambda _: (tops, place)).scan(logits)
    found = native_passes(kernels).scan(logits)
    assert known.best == found.best
    assert np.array_equal(known.tops, found.tops, equal_nan=True)


def test_columns_that_are_not_those_of_the_logits_lead_nowhere_else(kernels: Path) -> None:
    logits, tops = np.zeros((2, 100), np.float32), np.full((2, 2), 7, np.float32)
    place = logits.ctypes.data, tops.ctypes.data
    found = native_passes(kernels, lambda _: (tops, place)).scan(logits)
    assert found.best == [0, 0] and found.tops == [0, 0]


def test_an_output_of_a_name_that_is_ours_is_refused() -> None:
    model = as_head(rowwise_model(np.ones((64, 40), np.int8), np.ones(40, np.float32), False))
    with pytest.raises(ValueError, match=r"'logits\.tops', which is what our kernels add"):
        swap(swap(model))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_of_closed_models_take_no_memory(in_vectors: Path) -> None:
    resident: list[int] = []
    for seed in range(14):
        weight = np.random.default_rng(seed).integers(-127, 128, (2048, 2048)).astype(np.int8)
        model = rowwise_model(weight, np.ones(2048, np.float32), False)
        run(swap(model), in_vectors, {"x": np.ones((1, 2048), np.float32)})
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert resident[-1] - resident[3] < 20 << 20
