"""Products that add adapters themselves: their sums, and that a token's bits are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lifecycle.engines.adapter_bank import as_pairs, as_tiles
from lifecycle.engines.adapters import PLACES, TOKENS
from lifecycle.engines.native.swap import swap
from lifecycle.graph.rounding import Grid
from tests.engines.native.conftest import run
from tests.engines.native.test_adapters import adapter_nodes
from tests.engines.native.test_products import blocks_model, rowwise_model

DEPTH, ADAPTERS = 72, 3
LAYOUTS = {"a": as_pairs, "b": as_tiles}
CASES = [([48], False), ([96, 16, 16], False), ([80, 80], True), ([16, 32, 64], True)]
"""Columns of the parts, and whether a product is split before they are added to."""


def adapted(
    parts: list[int], *, is_split: bool, block: int | None, rank: int = 4, depth: int = DEPTH
) -> bytes:
    """A product, row-wise or in blocks, and the nodes that add adapters to it."""
    columns, count = sum(parts), len(parts)
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((columns, depth)).astype(np.float32)
    if block is None:
        whole = np.ascontiguousarray(np.rint(weight.T * 30).astype(np.int8))
        model = rowwise_model(whole, np.full(columns, 1e-2, np.float32), transposed=False)
    else:
        model, _ = blocks_model(Grid(block), weight)
    proto = onnx.load_from_string(model)
    graph = proto.graph
    # What came out of it is what adapters are added to.
    graph.node[-1].output[0] = "base"
    graph.node.extend(adapter_nodes(parts, is_split=is_split))
    wide = {"a": (depth, rank * count)} | {f"b{k}": (rank, n) for k, n in enumerate(parts)}
    for name, shape in wide.items():
        dims = [None, *shape]
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    for name in (TOKENS, PLACES):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [None, None]))
    sizes = {"ranks": [rank] * count, "columns": parts}
    for name, values in sizes.items():
        array = np.array(values, np.int64)
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto.SerializeToString()


def step(parts: list[int], owners: list[int], rank: int = 4) -> dict[str, NDArray[Any]]:
    """Inputs whose tokens belong to so and so many adapters; the first tokens are always the same."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, DEPTH))[: len(owners)].astype(np.float32)
    of = [[t for t, owner in enumerate(owners) if owner == n] for n in range(ADAPTERS)]
    width = max(2, *map(len, of))
    found: dict[str, NDArray[Any]] = {
        "x": x,
        TOKENS: np.array([group + [0] * (width - len(group)) for group in of], np.int64),
        PLACES: np.array([[owner, of[owner].index(t)] for t, owner in enumerate(owners)], np.int64),
        "a": rng.standard_normal((ADAPTERS, DEPTH, rank * len(parts))).astype(np.float32),
    }
    for k, columns in enumerate(parts):
        found[f"b{k}"] = rng.standard_normal((ADAPTERS, rank, columns)).astype(np.float32)
    return found


def paired(given: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same inputs as a joined product takes them."""
    return {
        name: np.stack([LAYOUTS[name[0]](matrix) for matrix in array])
        if name[0] in LAYOUTS
        else array
        for name, array in given.items()
        if name not in (TOKENS, PLACES)
    } | {PLACES: given[PLACES], TOKENS: given[TOKENS]}


def halved(array: NDArray[np.float32]) -> NDArray[np.float64]:
    """Values rounded to bfloat16 by hand."""
    bits = array.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return rounded.view(np.float32).astype(np.float64)


def updates(given: dict[str, NDArray[Any]], parts: list[int], rank: int = 4) -> NDArray[np.float64]:
    """What is added, from rounded values in float64."""
    rows: list[NDArray[np.float64]] = []
    for t, (owner, _) in enumerate(given[PLACES]):
        inner = halved((halved(given["x"][t]) @ halved(given["a"][owner])).astype(np.float32))
        outer = [
            inner[k * rank : (k + 1) * rank] @ halved(given[f"b{k}"][owner])
            for k in range(len(parts))
        ]
        rows.append(np.concatenate(outer))
    return np.array(rows)


@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize(("parts", "is_split"), CASES)
def test_what_is_added(
    kernels: Path, parts: list[int], is_split: bool, block: int | None, rank: int
) -> None:
    model = adapted(parts, is_split=is_split, block=block, rank=rank)
    swapped = swap(model)
    assert b"AdapterUpdate" not in swapped and b"GatherND" not in swapped
    for owners in ([1], [0, 1, 2, 2, 0, 1, 1], [2] * 9, [0, 2] * 40):
        given = step(parts, owners, rank)
        none = given | {name: np.zeros_like(given[name]) for name in given if name[0] in "ab"}
        (base,) = run(swapped, kernels, paired(none))
        (found,) = run(swapped, kernels, paired(given))
        expected = updates(given, parts, rank)
        # Where x · A lies between two halves, it may be rounded to either.
        np.testing.assert_allclose(found - base, expected, atol=0.02 * np.abs(expected).max())
        assert np.abs(found - base - expected).mean() < 5e-4 * np.abs(expected).max()
        (exact,) = run(model, None, given)
        np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max())


@pytest.mark.parametrize("block", [None, 32])
def test_without_adapters_the_bits_are_the_products(kernels: Path, block: int | None) -> None:
    """The first adapter of a bank is zeros, for tokens without one."""
    model = adapted([48], is_split=False, block=block)
    given = step([48], [0, 1, 0, 2] * 5)
    given["a"][0] = given["b0"][0] = 0
    (found,) = run(swap(model), kernels, paired(given))
    proto = onnx.load_from_string(model)
    proto.graph.output.append(
        helper.make_tensor_value_info("base", TensorProto.FLOAT, [None, None])
    )
    # Watched from outside, a product stays by itself.
    apart = swap(proto.SerializeToString())
    assert b"AdapterUpdate" in apart
    base = run(apart, kernels, given)[1]
    assert np.array_equal(found[::2], base[::2]) and not np.array_equal(found, base)


@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize(("parts", "is_split"), CASES)
def test_no_token_changes_what_another_gets(
    kernels: Path, parts: list[int], is_split: bool, block: int | None, rank: int
) -> None:
    swapped = swap(adapted(parts, is_split=is_split, block=block, rank=rank))
    owners = [0, 1, 2, 2] * 10 + [1] * 100
    (together,) = run(swapped, kernels, paired(step(parts, owners, rank)))
    for count in (1, 2, 5, 9, 12, 17, 63, 64, 65, 130):
        for threads in (1, 2, 4):
            (alone,) = run(swapped, kernels, paired(step(parts, owners[:count], rank)), threads)
            assert np.array_equal(alone, together[:count])


@pytest.mark.parametrize(
    ("parts", "rank", "depth"),
    [([48], 3, DEPTH), ([40], 4, DEPTH), ([32, 8], 4, DEPTH), ([48], 4, 71)],
)
def test_what_does_not_come_two_by_two_stays_apart(parts: list[int], rank: int, depth: int) -> None:
    swapped = swap(adapted(parts, is_split=False, block=None, rank=rank, depth=depth))
    assert b"AdapterUpdate" in swapped and b"RowwiseMatMul" in swapped
    kinds = {
        i.name: i.type.tensor_type.elem_type for i in onnx.load_from_string(swapped).graph.input
    }
    assert kinds["a"] == kinds["b0"] == TensorProto.FLOAT


def test_weights_as_pairs() -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159, 1e-40, 3e38], np.float32)
    matrix = np.stack([values, values[::-1]])
    pairs = as_pairs(matrix)
    assert pairs.shape == matrix.shape and pairs.dtype == np.uint16
    columns = pairs.reshape(6, 2).astype(np.uint32) << 16
    # Halves to even: 1 + 2^-8 lies between 1 and 1 + 2^-7.
    expected = halved(matrix).T.astype(np.float32)
    assert np.array_equal(columns.view(np.float32), expected)
    assert list(expected[:3, 0]) == [1, 1, 1 + 2**-6]


def test_weights_in_tiles() -> None:
    matrix = np.arange(4 * 48, dtype=np.float32).reshape(4, 48)
    tiles = as_tiles(matrix)
    assert tiles.shape == matrix.shape
    found = (tiles.reshape(3, 2, 16, 2).astype(np.uint32) << 16).view(np.float32)
    for tile, pair, column, half in ((0, 0, 0, 1), (1, 1, 5, 0), (2, 0, 15, 1)):
        assert found[tile, pair, column, half] == matrix[2 * pair + half, 16 * tile + column]
