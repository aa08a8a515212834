"""Matrices that are rounded before they are stored, so that something can be done with all of them in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.graph.blockwise import Blockwise, Stored
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import EMBEDDING, Scheme, choose, decoder_names, tied
from lifecycle.graph.rewrite import GraphRewrite, Linear, matrix_shape
from lifecycle.graph.rounding import Blocks
from lifecycle.graph.weights import WeightFile


@dataclass(frozen=True, kw_only=True)
class Settled(Blockwise):
    """`Blockwise` with what it would come to given."""

    blocks: Mapping[str, Blocks]
    """By the names of the constants."""

    def _store(self, rewrite: GraphRewrite, name: str, weight: ir.Value) -> Stored:
        packed = self.blocks[str(weight.name)].pack()
        return self._add(rewrite, name, packed, matrix_shape(weight))


@dataclass(frozen=True, slots=True)
class Constants:
    """Other values for constants of a float32 graph, by name."""

    values: Mapping[str, NDArray[np.float32] | Blocks]

    def apply(self, rewrite: GraphRewrite) -> None:
        """Put them in their places."""
        for name, value in self.values.items():
            constant = rewrite.graph.initializers[name]
            if isinstance(value, Blocks):
                value = value.floats(matrix_shape(constant)[1])
            constant.const_value = ir.tensor(value, name=name)


@dataclass(frozen=True, slots=True)
class Rounded:
    """How the matrices of a decoder are to be stored; by the names of the constants."""

    blocks: Mapping[str, Blocks]
    rows: tuple[str, ...]
    """Those in row-wise int8."""


def round_matrices(
    source: Path, scratch: Path, scheme: Blockwise, exceptions: Mapping[str, Scheme | None]
) -> Rounded:
    """Round all matrices of the float32 decoder in `source`, mixtures left out, as `quantize_graph` would, one after the
    other, so that those behind make up for those before. A walk through the layers that `scheme` has must be fresh, and
    is used up.

    Raises:
        StageError: a pattern matches nothing.
    """
    blocks: dict[str, Blocks] = {}
    rows: list[str] = []
    with WeightFile(scratch / "rounded") as weights:
        rewrite = GraphRewrite(source, weights)
        chosen = choose(decoder_names(rewrite), scheme, exceptions)
        table = next(node for node in rewrite.lookups() if node.name == EMBEDDING).inputs[0]
        assert table is not None
        matrices: list[tuple[ir.Value, Linear | None, Scheme | None]] = [
            (linear.weight, linear, chosen[linear.name])
            for linear in rewrite.linears()
            if linear.weight is not table
        ]
        head = next((one.name for one in rewrite.linears() if one.weight is table), None)
        picked = chosen[EMBEDDING] if head is None else tied(chosen, scheme, head)
        for weight, linear, way in [*matrices, (table, None, picked)]:
            if isinstance(way, Blockwise):
                found = way.settled(rewrite, linear) if linear else way.rounded(rewrite, weight)
                blocks[str(weight.name)] = found
            elif isinstance(way, Int8Rowwise):
                rows.append(str(weight.name))
    return Rounded(blocks, tuple(rows))
