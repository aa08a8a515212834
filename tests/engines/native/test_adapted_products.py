"""Products that add adapters themselves: their sums, and that a token's bits are its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lifecycle.engines.adapters import PLACES, TOKENS
from lifecycle.engines.native.swap import swap
from lifecycle.engines.packed_adapter import pack_adapter, packed_bytes
from lifecycle.graph.rounding import Grid
from tests.engines.native.conftest import run
from tests.engines.native.test_adapters import adapter_nodes
from tests.engines.native.test_products import blocks_model, rowwise_model

DEPTH, ADAPTERS = 72, 3
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
    wide = {"p.a": (depth, rank * count)} | {f"p.b{k}": (rank, n) for k, n in enumerate(parts)}
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


def step(
    parts: list[int], owners: list[int], rank: int = 4, depth: int = DEPTH
) -> dict[str, NDArray[Any]]:
    """Inputs whose tokens belong to so and so many adapters; the first tokens are always the same."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, depth))[: len(owners)].astype(np.float32)
    of = [[t for t, owner in enumerate(owners) if owner == n] for n in range(ADAPTERS)]
    width = max(2, *map(len, of))
    found: dict[str, NDArray[Any]] = {
        "x": x,
        TOKENS: np.array([group + [0] * (width - len(group)) for group in of], np.int64),
        PLACES: np.array([[owner, of[owner].index(t)] for t, owner in enumerate(owners)], np.int64),
        "p.a": rng.standard_normal((ADAPTERS, depth, rank * len(parts))).astype(np.float32),
    }
    for k, columns in enumerate(parts):
        found[f"p.b{k}"] = rng.standard_normal((ADAPTERS, rank, columns)).astype(np.float32)
    return found


def packed(given: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same inputs as a joined product takes them."""
    second = [given[name] for name in sorted(given) if name.startswith("p.b")]
    banks = [pack_adapter(a, [b[n] for b in second]) for n, a in enumerate(given["p.a"])]
    others = {name: array for name, array in given.items() if not name.startswith("p.")}
    return {**others, "p": np.stack(banks)}


def steps(values: NDArray[Any], axis: int = -1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values in steps of which the largest has 127, and how large a step is."""
    size = np.abs(values.astype(np.float64)).max(axis, keepdims=True) / 127
    return np.rint(values / size), size


def updates(
    given: dict[str, NDArray[Any]], parts: list[int], rank: int, block: int | None
) -> NDArray[np.float64]:
    """What is added, from rounded values in float64."""
    x = given["x"]
    size = block or x.shape[1]
    blocks = [math.prod(steps(x[:, at : at + size])) for at in range(0, x.shape[1], size)]
    rows: list[NDArray[np.float64]] = []
    for row, (owner, _) in zip(np.concatenate(blocks, axis=1), given[PLACES], strict=True):
        a, of_a = steps(given["p.a"][owner], axis=0)
        outer: list[NDArray[np.float64]] = []
        for k in range(len(parts)):
            mine = slice(k * rank, (k + 1) * rank)
            inner, b = (
                steps(row @ a[:, mine]),
                steps(given[f"p.b{k}"][owner] * of_a[0, mine, None], 0),
            )
            outer.append(inner[0] * inner[1] @ (b[0] * b[1]))
        rows.append(np.concatenate(outer))
    return np.array(rows)


@pytest.mark.parametrize(("rank", "depth"), [(4, DEPTH), (40, DEPTH), (3, 71)])
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize(("parts", "is_split"), CASES)
def test_what_is_added(
    kernels: Path, parts: list[int], is_split: bool, block: int | None, rank: int, depth: int
) -> None:
    model = adapted(parts, is_split=is_split, block=block, rank=rank, depth=depth)
    swapped = swap(model)
    assert b"AdapterUpdate" not in swapped and b"GatherND" not in swapped
    for owners in ([1], [0, 1, 2, 2, 0, 1, 1], [2] * 9, [0, 2] * 40):
        given = step(parts, owners, rank, depth)
        none = packed(given)
        none["p"] = np.zeros_like(none["p"])
        (base,) = run(swapped, kernels, none)
        (found,) = run(swapped, kernels, packed(given))
        expected = updates(given, parts, rank, block)
        # A value halfway between two steps may go either way.
        np.testing.assert_allclose(found - base, expected, atol=0.02 * np.abs(expected).max())
        assert np.abs(found - base - expected).mean() < 1e-4 * np.abs(expected).max()
        (exact,) = run(model, None, given)
        np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max())


@pytest.mark.parametrize("block", [None, 32])
def test_without_adapters_the_bits_are_the_products(kernels: Path, block: int | None) -> None:
    """The first adapter of a bank is zeros, for tokens without one."""
    model = adapted([48], is_split=False, block=block)
    given = step([48], [0, 1, 0, 2] * 5)
    bank = packed(given)
    bank["p"][0] = 0
    (found,) = run(swap(model), kernels, bank)
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
    (together,) = run(swapped, kernels, packed(step(parts, owners, rank)))
    for count in (1, 2, 5, 9, 12, 17, 63, 64, 65, 130):
        for threads in (1, 2, 4):
            (alone,) = run(swapped, kernels, packed(step(parts, owners[:count], rank)), threads)
            assert np.array_equal(alone, together[:count])


def test_an_adapter_has_the_same_bits_by_matrices(in_vectors: Path, in_matrices: Path) -> None:
    """Of ranks that fill no whole matrix, too; and what is no number stays in its row."""
    for block, rank in ((None, 16), (None, 70), (32, 5), (64, 16)):
        swapped = swap(adapted([64, 32], is_split=False, block=block, rank=rank))
        given = packed(step([64, 32], [1] * 40 + [0, 2] * 20, rank))
        given["x"][3, 7] = np.nan
        (expected,), (found,) = run(swapped, in_vectors, given), run(swapped, in_matrices, given)
        assert np.isnan(found[3]).all() and np.isfinite(np.delete(found, 3, axis=0)).all()
        assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("parts", [[40], [32, 8]])
def test_what_fills_no_tiles_stays_apart(parts: list[int]) -> None:
    swapped = swap(adapted(parts, is_split=False, block=None))
    assert b"AdapterUpdate" in swapped and b"RowwiseMatMul" in swapped
    kinds = {
        i.name: i.type.tensor_type.elem_type for i in onnx.load_from_string(swapped).graph.input
    }
    assert kinds["p.a"] == kinds["p.b0"] == TensorProto.FLOAT


def test_a_joined_product_says_how_large_its_bank_is() -> None:
    swapped = onnx.load_from_string(swap(adapted([96, 16, 16], is_split=True, block=None, rank=5)))
    (bank,) = [i for i in swapped.graph.input if i.name.startswith("p")]
    kind = bank.type.tensor_type
    assert (bank.name, kind.elem_type) == ("p", TensorProto.UINT8)
    assert kind.shape.dim[1].dim_value == packed_bytes(DEPTH, 5, [96, 16, 16])
    onnx.checker.check_value_info(bank)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("rank", -1), ("rank", 2**62), ("rank", 2**60 + 16), ("rank", 0), ("part0", 2**62), ("part0", 40),
     ("part0", 64), ("part0", 0)],
)  # fmt: skip
def test_what_a_node_says_of_its_adapters_is_checked(
    kernels: Path, attribute: str, value: int
) -> None:
    """A graph may come from anybody: no number in it leads out of the bank."""
    proto = onnx.load_from_string(swap(adapted([48], is_split=False, block=None)))
    (node,) = [node for node in proto.graph.node if node.op_type == "RowwiseMatMul"]
    for found in node.attribute:
        if found.name == attribute:
            found.i = value
    given = packed(step([48], [0, 1, 2]))
    with pytest.raises(Exception, match="adapters of"):
        run(proto.SerializeToString(), kernels, given)


def test_matrices_that_do_not_fit_together_stay_apart() -> None:
    proto = onnx.load_from_string(adapted([32, 16], is_split=False, block=None))
    (second,) = [i for i in proto.graph.input if i.name == "p.b1"]
    second.type.tensor_type.shape.dim[1].dim_value = 5
    assert b"AdapterUpdate" in swap(proto.SerializeToString())


def test_weights_in_bytes() -> None:
    """A by 16 columns and 4 of k, then B by 16 columns, 4 of the rank, and the scales of the columns."""
    rng = np.random.default_rng(0)
    depth, rank, parts = 10, 6, [32, 16]
    a = rng.standard_normal((depth, 2 * rank)).astype(np.float32)
    a[:, 3] = 0
    second = [rng.standard_normal((rank, n)).astype(np.float32) for n in parts]
    found = pack_adapter(a, second)
    assert found.shape == (packed_bytes(depth, rank, parts),) and found.dtype == np.uint8
    (of_a, size), inner = steps(np.where(a == 0, 1e-9, a), axis=0), 3 * 64
    size[0, 3] = 0
    for k, column in ((0, 0), (9, 11), (5, 3), (7, 10)):
        wanted = 0 if column == 3 else of_a[k, column]
        assert found[k // 4 * 64 + column * 4 + k % 4] - 128.0 == wanted
    tile_bytes = 2 * 64 + 64
    for part, r, column in ((0, 0, 0), (0, 5, 31), (1, 2, 7)):
        mine = second[part] * size[0, part * rank : (part + 1) * rank, None]
        of_b, size_b = steps(mine, axis=0)
        tile = inner + (2 * part + column // 16) * tile_bytes
        byte = found[tile + r // 4 * 64 + column % 16 * 4 + r % 4]
        assert byte - 128.0 == of_b[r, column]
        scale = found[tile + 128 + column % 16 * 4 :][:4].view(np.float32)[0]
        np.testing.assert_allclose(scale, size_b[0, column], rtol=1e-6)


def test_weights_beyond_all_bounds_are_refused() -> None:
    a, b = np.full((8, 4), 1e30, np.float32), np.full((4, 16), 1e30, np.float32)
    for first in (a, np.full_like(a, np.inf), np.full_like(a, np.nan)):
        with pytest.raises(OverflowError):
            pack_adapter(first, [b])
    assert not pack_adapter(np.zeros_like(a), [np.zeros_like(b)]).view(np.uint8)[-64:].any()
