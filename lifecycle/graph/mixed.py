"""Which matrices to store coarsely and which finely: by what each costs by itself, under a budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lifecycle.errors import StageError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.experts import experts_bytes
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import EMBEDDING, Scheme, choose, decoder_names
from lifecycle.graph.rewrite import GraphRewrite, matrix_shape
from lifecycle.graph.rounding import Blocks, Floats
from lifecycle.graph.scratch import mapped
from lifecycle.graph.sensitivity import divergences
from lifecycle.graph.weights import WeightFile

_TOKENS = 4096
"""Tokens of calibration that every matrix is tried on."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What storing one matrix coarsely instead of finely does."""

    name: str
    kl: float
    """Mean divergence of the predictions from those in float32, in nats per token."""
    saved: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What every matrix that can be stored either way costs, and what there is besides."""

    costs: tuple[Cost, ...]
    elements: int
    """Weights of all matrices that are quantised."""
    least: int
    """Bytes of them with all coarse."""


def measure(
    source: Path,
    scratch: Path,
    texts: Sequence[Sequence[int]],
    coarse: Blockwise,
    fine: Int8Rowwise,
    exceptions: Mapping[str, Scheme | None],
    on_done: Callable[[int, int], None] | None = None,
    *,
    bits: float | None = None,
) -> Measured:
    """Round every matrix of a float32 graph as `coarse` does, alone, and see what becomes of the
    predictions on the first of `texts`.

    A walk through the layers that `coarse` has must be fresh, and is used up. Mixtures stay coarse;
    `scratch` is a folder for what is not kept; `exceptions` are as `quantize_graph` takes them.
    `bits` per weight that nothing can hold are refused before anything is measured.

    Raises:
        StageError: there are no texts, one is too long, a pattern matches nothing, or `bits` are
            too few.
    """
    with WeightFile(scratch / "unused") as weights:
        rewrite = GraphRewrite(source, weights)
        chosen = choose(decoder_names(rewrite), coarse, exceptions)
        matrices = _matrices(rewrite, chosen, coarse)
        shapes = {name: matrix_shape(weight) for name, weight in matrices.items()}
        finely = {name: fine.bytes(shape) for name, shape in shapes.items()}
        coarsely = {name: coarse.bytes(shape) for name, shape in shapes.items()}
        elements, least = _mixtures(rewrite, chosen, coarse)
        elements += sum(map(prod, shapes.values()))
        if bits is not None:
            saved = (finely[name] - size for name, size in coarsely.items())
            _spare(bits, least + sum(coarsely.values()), elements, saved)

        def rounded(name: str) -> Floats:
            blocks = _rounded(rewrite, matrices[name], coarse)
            # Scales for which 8 bits are too coarse take more than was thought.
            coarsely[name] = blocks.pack().bytes
            # In a file: those of a head are as large as many layers.
            width = shapes[name][1]
            floats = (part.floats(width) for part in blocks.parts())
            return mapped(floats, shapes[name], np.dtype(np.float32), scratch)

        constants = {str(w.name): partial(rounded, name) for name, w in matrices.items()}
        vocab, _ = matrix_shape(_table(rewrite))
        found = divergences(source, _first(texts), vocab, constants, scratch, on_done)
    costs = (
        Cost(name, found[str(weight.name)], finely[name] - coarsely[name])
        for name, weight in matrices.items()
    )
    return Measured(tuple(costs), elements, least + sum(coarsely.values()))


def _mixtures(
    rewrite: GraphRewrite, chosen: Mapping[str, Scheme | None], coarse: Blockwise
) -> tuple[int, int]:
    """The weights, and the bytes, of the mixtures that `coarse` is chosen for."""
    elements = size = 0
    for mixture in rewrite.mixtures():
        if chosen[mixture.name] is coarse:
            more, stored = experts_bytes(mixture, coarse.grid)
            elements, size = elements + more, size + stored
    return elements, size


def within_bits(measured: Measured, bits: float) -> list[Cost]:
    """The matrices to store finely with `bits` per weight at most: those that gain most per byte, as
    long as they fit.

    Raises:
        StageError: all in the coarse form takes more.
    """
    saved = (cost.saved for cost in measured.costs)
    spare = _spare(bits, measured.least, measured.elements, saved)
    chosen: list[Cost] = []
    for cost in _ranked(measured.costs):
        if cost.saved <= spare:
            spare -= max(cost.saved, 0)
            chosen.append(cost)
    return chosen


def within_kl(measured: Measured, kl: float) -> list[Cost]:
    """The fewest matrices to store finely so that what the others cost adds up to `kl` at most."""
    chosen: list[Cost] = []
    left = sum(cost.kl for cost in measured.costs)
    for cost in _ranked(measured.costs):
        if left <= kl and cost.saved > 0:
            break
        left -= cost.kl
        chosen.append(cost)
    return chosen


def save(measured: Measured, fine: Sequence[Cost], path: Path) -> None:
    """Write what was measured and chosen, the matrices in the order in which 8 bits are worth most."""
    kept = {cost.name for cost in fine}
    rows = [
        {
            "matrix": cost.name,
            "bits": 8 if cost.name in kept else 4,
            "kl_in_4_bits": float(f"{cost.kl:.6g}"),
            "bytes_saved_by_4_bits": cost.saved,
        }
        for cost in _ranked(measured.costs)
    ]
    expected = sum(cost.kl for cost in measured.costs if cost.name not in kept)
    content = {"expected_kl": float(f"{expected:.6g}"), "matrices": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _spare(bits: float, coarse: int, elements: int, saved: Iterable[int]) -> float:
    """The bytes that a budget leaves over the least that the model takes.

    Raises:
        StageError: it is less than that.
    """
    # Narrow matrices, whose last block is mostly filling, take less in the fine form.
    least = coarse + sum(min(size, 0) for size in saved)
    spare = bits * elements / 8 - least
    if spare < 0:
        raise StageError(
            f"budget: {bits:g} bits per weight are fewer than the {8 * least / elements:.3f} that "
            "this model takes at least; raise bits_per_weight, or block_size"
        )
    return spare


def _ranked(costs: Sequence[Cost]) -> list[Cost]:
    return sorted(costs, key=lambda c: (c.saved > 0, -c.kl / max(c.saved, 1), c.name))


def _matrices(
    rewrite: GraphRewrite, chosen: Mapping[str, Scheme | None], coarse: Blockwise
) -> dict[str, ir.Value]:
    """The weights of all products, and the table of the embedding, that `coarse` is chosen for. A
    table that is the head too goes by the head's name."""
    table = _table(rewrite)
    found = {linear.name: linear.weight for linear in rewrite.linears()}
    if table in found.values():
        chosen = {
            name: coarse
            if chosen[EMBEDDING] is chosen[name] is coarse
            else None
            if weight is table
            else chosen[name]
            for name, weight in found.items()
        }
    else:
        found = {EMBEDDING: table, **found}
    return {name: weight for name, weight in found.items() if chosen[name] is coarse}


def _table(rewrite: GraphRewrite) -> ir.Value:
    table = next(node for node in rewrite.lookups() if node.name == EMBEDDING).inputs[0]
    assert table is not None
    return table


def _rounded(rewrite: GraphRewrite, weight: ir.Value, scheme: Blockwise) -> Blocks:
    if weight is _table(rewrite):
        return scheme.rounded(rewrite, weight)
    linear = next(linear for linear in rewrite.linears() if linear.weight is weight)
    return scheme.rounded_product(rewrite, linear)


def _first(texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    found: list[Sequence[int]] = []
    count = 0
    for text in texts:
        count += len(text)
        if found and count > _TOKENS:
            break
        found.append(text)
    return found
