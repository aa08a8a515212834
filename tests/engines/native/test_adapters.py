"""What adapters add to a product, and norms: their sums, and that a token's bits are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from lifecycle.engines.adapters import PLACES, TOKENS
from lifecycle.engines.native.swap import swap
from tests.engines.native.conftest import build, run

RANK, DEPTH = 4, 40


def adapter_nodes(parts: list[int], *, is_split: bool) -> list[onnx.NodeProto]:
    """The nodes of `lifecycle.graph.adapters` around `base`, a product of `x` whose parts have so many columns."""
    count = len(parts)
    nodes = [
        helper.make_node("Gather", ["x", TOKENS], ["read"]),
        helper.make_node("MatMul", ["read", "p.a"], ["inner"]),
    ]
    inner = [f"inner.{k}" for k in range(count)] if count > 1 else ["inner"]
    if count > 1:
        nodes.append(helper.make_node("Split", ["inner", "ranks"], inner, axis=-1))
    outer = [f"outer.{k}" for k in range(count)]
    nodes += [helper.make_node("MatMul", [inner[k], f"p.b{k}"], [outer[k]]) for k in range(count)]
    if is_split:
        bases = [f"base.{k}" for k in range(count)]
        nodes.insert(0, helper.make_node("Split", ["base", "columns"], bases, axis=-1))
    else:
        bases = ["base"]
        nodes.append(helper.make_node("Concat", outer, ["whole"], axis=-1))
        outer = ["whole"]
    sums = [f"sum.{k}" for k in range(len(bases))]
    for update, base, added in zip(outer, bases, sums, strict=True):
        nodes.append(helper.make_node("GatherND", [update, PLACES], [f"packed.{added}"]))
        nodes.append(helper.make_node("Add", [f"packed.{added}", base], [added]))
    return [*nodes, helper.make_node("Concat", sums, ["y"], axis=-1)]


def adapter_model(parts: list[int], *, is_split: bool) -> bytes:
    """Those nodes as a model."""
    count = len(parts)
    flat, bank = np.zeros((1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    inputs: dict[str, Any] = {"x": flat, "base": flat, "p.a": bank}
    inputs |= {f"p.b{k}": bank for k in range(count)}
    inputs |= {TOKENS: np.zeros((1, 1), np.int64), PLACES: np.zeros((1, 2), np.int64)}
    weights = {"ranks": np.full(count, RANK, np.int64), "columns": np.array(parts, np.int64)}
    return build(adapter_nodes(parts, is_split=is_split), inputs, weights, {"y": flat})


def inputs(parts: list[int], owners: list[int], seed: int = 0) -> dict[str, NDArray[Any]]:
    """A step whose tokens belong to so and so many adapters."""
    rng = np.random.default_rng(seed)
    of = [[t for t, owner in enumerate(owners) if owner == n] for n in range(max(owners) + 1)]
    width = max(2, *map(len, of))
    found: dict[str, NDArray[Any]] = {
        "x": rng.standard_normal((50, DEPTH))[: len(owners)].astype(np.float32),
        "base": rng.standard_normal((50, sum(parts)))[: len(owners)].astype(np.float32),
        TOKENS: np.array([group + [0] * (width - len(group)) for group in of], np.int64),
        PLACES: np.array([[owner, of[owner].index(t)] for t, owner in enumerate(owners)], np.int64),
    }
    rng = np.random.default_rng(9)
    found["p.a"] = rng.standard_normal((3, DEPTH, RANK * len(parts))).astype(np.float32)
    for k, columns in enumerate(parts):
        found[f"p.b{k}"] = rng.standard_normal((3, RANK, columns)).astype(np.float32)
    for name in ("p.a", *(f"p.b{k}" for k in range(len(parts)))):
        found[name] = found[name][: len(of)]
    return found


CASES = [([48], False), ([33], True), ([32, 16, 16], False), ([172, 172], True), ([20, 7, 3], True)]


@pytest.mark.parametrize(("parts", "is_split"), CASES)
def test_what_adapters_add(kernels: Path, parts: list[int], is_split: bool) -> None:
    model = adapter_model(parts, is_split=is_split)
    swapped = swap(model)
    assert b"AdapterUpdate" in swapped
    given = inputs(parts, [0, 2, 1, 1, 0, 2, 2] * 3)
    (expected,), (found,) = run(model, None, given), run(swapped, kernels, given)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("parts", "is_split"), CASES)
def test_no_token_changes_what_another_gets(
    kernels: Path, parts: list[int], is_split: bool
) -> None:
    swapped = swap(adapter_model(parts, is_split=is_split))
    owners = [0, 1, 2] * 16
    (together,) = run(swapped, kernels, inputs(parts, owners))
    for count in (1, 2, 5, 9, 30):
        for threads in (1, 2):
            (alone,) = run(swapped, kernels, inputs(parts, owners[:count]), threads)
            assert np.array_equal(alone, together[:count])


def test_sums_that_differ_stay_as_they_are() -> None:
    model = adapter_model([48], is_split=False)
    for old, new in ((b"GatherND", b"GatherNX"), (PLACES.encode(), b"adapter_placez")):
        assert b"AdapterUpdate" not in swap(model.replace(old, new))


@pytest.mark.parametrize("width", [64, 37])
def test_norms(kernels: Path, width: int) -> None:
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization", ["x", "skip", "gamma"], ["y", "", "", "sum"],
        domain="com.microsoft", epsilon=1e-5,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    flat = np.zeros((1, 1), np.float32)
    gamma = rng.standard_normal(width).astype(np.float32)
    model = build([node], {"x": flat, "skip": flat}, {"gamma": gamma}, {"y": flat, "sum": flat})
    x, skip = rng.standard_normal((2, 90, width)).astype(np.float32)
    x[3, 1] = np.nan
    swapped = swap(model)
    assert b"SkipNorm" in swapped
    expected = run(model, None, {"x": x, "skip": skip})
    found = run(swapped, kernels, {"x": x, "skip": skip})
    for new, old in zip(found, expected, strict=True):
        np.testing.assert_allclose(new, old, atol=2e-5)
    (alone, _) = run(swapped, kernels, {"x": x[:1], "skip": skip[:1]})
    assert np.array_equal(alone, found[0][:1])
