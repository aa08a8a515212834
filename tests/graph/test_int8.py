"""Row-wise int8: close to float32, and no row ever feels another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from tests.exact import WEIGHT_BITS
from tests.graph.models import (
    VOCAB,
    export_quantized,
    replace_matrices,
    save_model,
    torch_logits,
)
from tests.graph.running import GraphRunner


@pytest.fixture(scope="module")
def int8(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8")
    quantize_graph(tiny, out, "int8-rowwise", Int8Rowwise(7))
    return out


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    others=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=20), min_size=3, max_size=3),
)
def test_a_row_has_the_same_bits_alone_and_among_others(
    int8: Path, ids: list[int], others: list[list[int]]
) -> None:
    alone = GraphRunner(int8, 4).step({1: ids})[1]
    among = GraphRunner(int8, 4).step({1: ids, **dict(zip((0, 2, 3), others, strict=True))})[1]
    assert np.array_equal(alone, among)


def test_an_outlier_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    loud, silent = 5, 6
    save_model("llama-tied", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][loud] *= 1e4
    weights["model.embed_tokens.weight"][silent] = 0
    save_file(weights, file)
    out = export_quantized(tmp_path, Int8Rowwise(WEIGHT_BITS))
    ids = [7, 8, 9]
    alone = GraphRunner(out, 3).step({0: ids})[0]
    among = GraphRunner(out, 3).step({0: ids, 1: [loud] * 3, 2: [silent] * 3})
    assert np.array_equal(alone, among[0])
    assert np.array_equal(among[2], np.zeros_like(among[2]))


@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "mistral-window", "qwen2", "qwen3"])
@pytest.mark.parametrize("bits", sorted({7, WEIGHT_BITS}))
def test_logits_follow_the_dequantized_weights(name: str, bits: int, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    scheme = Int8Rowwise(bits)
    out = export_quantized(tmp_path, scheme)

    def round_trip(weights: NDArray[np.float32]) -> NDArray[np.float32]:
        values, scales = scheme.quantize([weights], weights.shape)
        return values * scales[:, None]

    replace_matrices(model, round_trip)
    ids = np.random.default_rng(0).integers(3, VOCAB, 30).tolist()
    wanted = torch_logits(model, ids)
    # What remains is the activations' rounding to int8.
    found = GraphRunner(out).prefill(ids)
    assert np.linalg.norm(found - wanted) < 0.04 * np.linalg.norm(wanted)


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([7, 8]), st.integers(0, 2**32 - 1))
def test_each_weight_is_within_half_a_step(rows: int, width: int, bits: int, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    weights[0] = 0
    scheme = Int8Rowwise(bits)
    values, scales = scheme.quantize([weights[:1], weights[1:]], weights.shape)
    assert np.abs(values).max() <= 2 ** (bits - 1) - 1
    assert (np.abs(values * scales[:, None] - weights) <= 0.501 * scales[:, None]).all()
