"""Factors moved between the inputs of products and their weights, through the norm before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.graph.calibration import Calibration
from lifecycle.graph.channels import NORMS
from lifecycle.graph.rewrite import GraphRewrite, Linear

_Floats = NDArray[np.float32]

_BOUNDS = (1e-5, 1e5)
"""Of factors: channels that are all but silent must not make others overflow."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): channels that are large wherever a product
    reads them are made smaller, and the weights that they meet larger, by
    max|x|^strength / max|w|^(1 - strength)."""

    calibration: Calibration
    strength: float

    def apply(self, rewrite: GraphRewrite) -> None:
        """Smooth all products that nothing but a norm stands before."""
        for norm, products in normed_products(rewrite):
            inputs = self.calibration.largest(products[0].name)
            weights = np.max([_largest_columns(rewrite, product) for product in products], axis=0)
            fold(rewrite, norm, products, smoothing_factors(inputs, weights, self.strength))


def smoothing_factors(inputs: _Floats, weights: _Floats, strength: float) -> _Floats:
    """The factor of each channel, from the largest that it reads and is multiplied by, [in] each; 1 for
    channels that one of them never uses."""
    used = (inputs > 0) & (weights > 0)
    x, w = np.where(used, inputs, 1), np.where(used, weights, 1)
    return np.clip(x**strength / w ** (1 - strength), *_BOUNDS).astype(np.float32)


def normed_products(rewrite: GraphRewrite) -> Iterator[tuple[ir.Node, list[Linear]]]:
    """Norms that only products with weights of their own read, and those products, in the order of
    the graph."""
    by_node = {linear.node: linear for linear in rewrite.linears()}
    for node in rewrite.graph:
        if node.op_type not in NORMS:
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        products = [by_node[reader] for reader in readers if reader in by_node]
        own = all(len(product.weight.uses()) == 1 for product in products)
        if products and len(products) == len(readers) and own:
            yield node, products


def fold(
    rewrite: GraphRewrite, norm: ir.Node, products: Sequence[Linear], factors: _Floats
) -> None:
    """Divide what a norm gives by `factors` [hidden], and let the weights of all `products` that read it
    make up for that."""
    for weight in norm.inputs[NORMS[norm.op_type]]:
        if weight is not None:
            rewrite.scale(weight, rows=(1 / factors).astype(np.float32))
    for product in products:
        rewrite.scale(product.weight, columns=factors)


def _largest_columns(rewrite: GraphRewrite, product: Linear) -> _Floats:
    blocks = rewrite.map_blocks(product.weight, lambda block: np.abs(block).max(axis=0))
    return np.max(list(blocks), axis=0)
