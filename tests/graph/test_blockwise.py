"""Blocked 4-bit weights: least error per block, and one store for a tied head and embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lifecycle.graph import hqq
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.rounding import Fit, Grid, Packed, least_squares, quantize
from lifecycle.graph.scales import storable, unit_of
from tests.graph.models import (
    VOCAB,
    export_quantized,
    replace_matrices,
    save_model,
    torch_logits,
)
from tests.graph.running import GraphRunner, relative_errors

BLOCK_SIZES = (16, 32, 64, 128)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """The definition: of two integers in a byte, the first is in its lower half."""
    parts = [packed] if bits == 8 else [packed & 15, packed >> 4]
    return np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def dequantized(
    weights: NDArray[np.float32], grid: Grid, fit: Fit = least_squares
) -> NDArray[np.float32]:
    """Weights [rows, in] as what is stored says: (integer - zero) * scale."""
    found = quantize(weights, grid, fit)
    zeros = found.packed_zeros()
    points = np.float32(grid.middle)
    if zeros is not None:
        points = unpack(zeros, grid.bits)[:, : found.scales.shape[1], None]
    whole = (unpack(found.packed(), grid.bits) - points) * found.scales[..., None]
    return whole.reshape(len(weights), -1)[:, : weights.shape[1]]


def fitted(weights: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """The same with scales stored to fit a whole matrix."""
    return dequantized(weights, grid.fitting([grid.largest(weights)]))


@given(
    st.integers(1, 5), st.integers(1, 3), st.sampled_from(BLOCK_SIZES), st.integers(0, 2**32 - 1)
)
def test_no_block_is_worse_than_rounded_by_its_largest(
    rows: int, blocks: int, size: int, seed: int
) -> None:
    shape = (rows * blocks, size)
    weights = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    both = [
        dequantized(weights.reshape(rows, -1), Grid(size, symmetric=symmetric)).reshape(shape)
        for symmetric in (True, False)
    ]
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=1)[:, None], axis=1)
    plain = np.clip(np.round(weights / (largest / -8)), -8, 7) * (largest / -8)
    error, free, bound = (np.square(w - weights).sum(axis=1) for w in (*both, plain))
    assert (error <= bound * 1.0001).all() and (free <= bound * 1.0001).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "llama-narrow", "mixtral", "qwen3_moe"])
def test_eight_bits_are_close_to_float(name: str, symmetric: bool, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    out = export_quantized(tmp_path, Blockwise(16, 8, symmetric))
    ids = np.random.default_rng(0).integers(3, VOCAB, 30).tolist()
    wanted, found = torch_logits(model, ids), GraphRunner(out).prefill(ids)
    errors = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(errors) < 0.03
    eye = np.eye(16, dtype=np.float32)
    np.testing.assert_allclose(dequantized(eye, Grid(16, 8, symmetric)), eye, atol=5e-4)


@pytest.mark.parametrize(
    ("fit", "symmetric"), [(least_squares, True), (least_squares, False), (hqq.fit, False)]
)
def test_zeros_stay_zeros(fit: Fit, symmetric: bool) -> None:
    zeros = np.zeros((2, 40), np.float32)
    assert np.array_equal(dequantized(zeros, Grid(32, symmetric=symmetric), fit), zeros)


@pytest.mark.parametrize(("symmetric", "most"), [(True, 0.083), (False, 0.078)])
def test_what_normal_weights_lose(symmetric: bool, most: float) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    found = dequantized(weights, Grid(32, symmetric=symmetric))
    assert np.linalg.norm(found - weights) < most * np.linalg.norm(weights)


@given(st.integers(-40, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_scales_of_any_size_keep_what_they_are_worth(
    power: int, symmetric: bool, seed: int
) -> None:
    grid, factor = Grid(32, symmetric=symmetric), np.float32(2.0) ** power
    weights = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)
    found = quantize(weights * factor, grid, least_squares)
    error = np.linalg.norm(found.floats(64) / factor - weights)
    assert error < 0.12 * np.linalg.norm(weights)
    stored = found.pack().scales
    np.testing.assert_array_equal(stored.floats(), found.scales)
    if -10 <= power <= 15:
        assert stored.values.dtype == np.float16
    if not -18 <= power <= 20:
        assert stored.values.dtype == np.float32
    fitting = grid.fitting([grid.largest(weights * factor)])
    coded = quantize(weights * factor, fitting, least_squares)
    assert np.linalg.norm(coded.floats(64) / factor - weights) < 0.12 * np.linalg.norm(weights)
    np.testing.assert_array_equal(coded.pack().scales.floats(), coded.scales)
    assert coded.pack().scales.values.dtype == np.int8


def test_scales_that_are_small_beside_a_few_stay_in_16_bits() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    grid = Grid(32)
    weights[0, 0] = 40
    assert grid.fitting([grid.largest(weights)]).unit is not None
    weights[0, 0] = 600
    assert grid.fitting([grid.largest(weights)]).unit is None


@pytest.mark.parametrize("small", [slice(1, 2), slice(0, None, 3), slice(5, None, 16)])
def test_scales_that_are_small_in_some_columns_stay_in_16_bits(small: slice) -> None:
    steps = np.random.default_rng(0).uniform(0.05, 0.1, (1536, 48)).astype(np.float32)
    assert unit_of(steps.ravel()) is not None
    steps[:, small] = 1e-5
    assert unit_of(steps.ravel()) is None


def test_scales_in_8_bits_are_exact_to_a_few_percent() -> None:
    found = np.geomspace(1e-4, 1, 1000, dtype=np.float32) * np.float32([1, -1])[:, None]
    unit = unit_of(np.ones(1, np.float32))
    kept = storable(found, unit)
    assert (np.sign(kept) == np.sign(found)).all()
    sizes = np.abs(found)
    # Codes are roots: the nearest one is half a step off at most, and steps grow with the root.
    assert (np.abs(kept - found) <= np.sqrt(sizes * unit) + unit).all()
    np.testing.assert_array_equal(storable(kept, unit), kept)
    assert np.abs(kept / found - 1)[sizes > 0.05].max() < 0.04


def test_one_block_beyond_16_bits_keeps_the_matrix_in_float32() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    grid = Grid(32)
    small, large = (quantize(w, grid, least_squares).pack() for w in (weights, weights * 1e7))
    joined = Packed.joined([small, large])
    kinds = [part.scales.values.dtype for part in (small, large)]
    assert kinds == [np.float16, np.float32]
    whole = np.concatenate([small.scales.floats(), large.scales.floats()])
    np.testing.assert_array_equal(joined.scales.floats(), whole)
    assert joined.bytes == small.bytes + large.bytes + 2 * small.scales.values.size


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_a_matrix_takes_is_known_before(bits: Literal[4, 8], symmetric: bool) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 80)).astype(np.float32)
    grid = Grid(32, bits, symmetric)
    packed = quantize(weights, grid.fitting([grid.largest(weights)]), least_squares).pack()
    assert packed.bytes == grid.bytes(weights.shape)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_onnx_runtime_widens_scales_when_it_loads_the_graph(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    out = export_quantized(tmp_path, Blockwise(16))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])
    written, loaded = (
        onnx.load(path, load_external_data=False).graph
        for path in (out / "model.onnx", options.optimized_model_filepath)
    )
    scales = {tensor.name: tensor.data_type for tensor in written.initializer}
    codes = {n for n, kind in scales.items() if kind == onnx.TensorProto.INT8}
    casts = [node for node in written.node if node.op_type == "Cast"]
    assert {node.input[0] for node in casts} == codes != set()
    left = {name for node in loaded.node for name in node.input}
    assert not left & {node.output[0] for node in written.node if node.op_type == "Cast"} - codes
    assert not left & codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "qwen3", "llama-narrow"])
def test_logits_follow_the_dequantized_weights(
    name: str, block_size: int, symmetric: bool, tmp_path: Path
) -> None:
    model = save_model(name, tmp_path)
    out = export_quantized(tmp_path, Blockwise(block_size, symmetric=symmetric))
    replace_matrices(model, lambda w: fitted(w, Grid(block_size, symmetric=symmetric)))
    ids = np.random.default_rng(0).integers(3, VOCAB, 30).tolist()
    wanted = torch_logits(model, ids)
    # What remains is the activations' rounding to int8.
    found = GraphRunner(out).prefill(ids)
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe-mixed"])
def test_experts_follow_the_dequantized_weights(
    name: str, block_size: int, symmetric: bool, tmp_path: Path
) -> None:
    model = save_model(name, tmp_path)
    size = block_size if name == "mixtral" else 16
    out = export_quantized(tmp_path, Blockwise(size, symmetric=symmetric))
    replace_matrices(model, lambda w: fitted(w, Grid(size, symmetric=symmetric)))
    # Where two experts are nearly as good, the activations' rounding may pick the other, and the tokens behind
    # read what that one gives.
    assert np.median(relative_errors(model, out, 5)) < 0.03


def test_a_tied_head_and_embedding_share_their_bytes(tiny: Path, tmp_path: Path) -> None:
    quantize_graph(tiny, tmp_path, "int4", Blockwise())
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    offsets = {
        tensor.name: entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    }
    assert offsets["embed_tokens.weight.int4"] == offsets["embed_tokens.weight.int4_rows"]
    readers = [n for n in graph.node if "embed_tokens.weight.scales.scaled" in n.input]
    assert {node.op_type for node in readers} == {"GatherBlockQuantized", "MatMulNBits"}
