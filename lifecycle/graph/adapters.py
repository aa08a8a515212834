"""LoRA slots: the nodes that add x · A · B to a product, of another adapter for each row.

The tokens of each adapter are gathered into [N, Q, in], so that the products run over all adapters
at once and read the weights of each but once (docs/decisions.md has what was tried beside).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from lifecycle.engines import adapters
from lifecycle.engines.adapters import AdapterLayout, Module, Product
from lifecycle.engines.decoder import GRAPH
from lifecycle.graph.hidden import save_hidden, take_hidden
from lifecycle.graph.nodes import IR_VERSION, GraphNodes, save_model

_PREFIX = "adapters."
_SUM = ".sum"


class AdapterSlots:
    """Adds the room for adapters to the products of a graph that is being built."""

    def __init__(self, g: GraphNodes, slots: int, rank: int) -> None:
        self._g, self._slots, self._rank = g, slots, rank
        self._products: list[Product] = []
        int64 = ir.DataType.INT64
        self._tokens = g.input(adapters.TOKENS, int64, ("N", "Q"))
        self._places = g.input(adapters.PLACES, int64, ("T", 2))

    @property
    def layout(self) -> AdapterLayout:
        """What the graph has room for."""
        return AdapterLayout(self._slots, self._rank, tuple(self._products))

    def add(self, product: Product, x: ir.Value, ys: Sequence[ir.Value]) -> list[ir.Value]:
        """What the base weights make of `x` [T, in], and what the adapter of each token adds to it:
        `ys` is one [T, out] for each module, or a single one for all."""
        self._products.append(product)
        g, name, count = self._g, f"{_PREFIX}{product.name}", len(product.modules)
        read = g.node("Gather", f"{name}.x", x, self._tokens)
        a = self._bank(product.a, product.width, count * self._rank)
        parts = [g.node("MatMul", f"{name}.inner", read, a)]
        if count > 1:
            sizes = g.integers(f"{_PREFIX}split.{count}", *[self._rank] * count)
            names = [f"{name}.inner.{k}" for k in range(count)]
            parts = list(g.nodes("Split", f"{name}.split", (*parts, sizes), names, axis=-1))
        updates = [
            g.node("MatMul", f"{name}.outer.{k}", part, self._bank(product.b(k), self._rank, rows))
            for k, (part, rows) in enumerate(
                zip(parts, (module.rows for module in product.modules), strict=True)
            )
        ]
        if len(ys) < count:
            updates = [g.node("Concat", f"{name}.outer", *updates, axis=-1)]
        packed = [
            g.node("GatherND", f"{name}.packed.{k}", update, self._places)
            for k, update in enumerate(updates)
        ]
        pairs = enumerate(zip(packed, ys, strict=True))
        return [g.node("Add", f"{name}.{k}{_SUM}", *pair) for k, pair in pairs]

    def _bank(self, name: str, rows: int, columns: int) -> ir.Value:
        return self._g.input(name, ir.DataType.FLOAT, ("N", rows, columns))


def modules_of(prefix: str, names: list[str], rows: list[int]) -> tuple[Module, ...]:
    """The modules `names` below `prefix`, with so many rows each."""
    return tuple(Module(f"{prefix}{name}", n) for name, n in zip(names, rows, strict=True))


def graph_file(folder: Path) -> str:
    """The graph of a folder that has all there is: that with slots, if there is one."""
    return adapters.GRAPH if (folder / adapters.GRAPH).is_file() else GRAPH


def save_graphs(graph: ir.Graph, folder: Path, ir_version: int = IR_VERSION) -> None:
    """Write `model.onnx`, before it `adapters.onnx` if the graph has slots, and behind it `hidden.onnx`
    if it gives hidden states. `graph` loses them."""
    hidden_size = take_hidden(graph)
    if any(value.name == adapters.TOKENS for value in graph.inputs):
        save_model(graph, folder / adapters.GRAPH, ir_version)
        _remove_slots(graph)
    save_model(graph, folder / GRAPH, ir_version)
    if hidden_size is not None:
        save_hidden(graph, hidden_size, folder, ir_version)


def _remove_slots(graph: ir.Graph) -> None:
    """A batch without adapters then runs what it would run if there were no slots."""
    nodes = [node for node in graph if (node.name or "").startswith(_PREFIX)]
    for node in nodes:
        if (node.name or "").endswith(_SUM):
            base = node.inputs[1]
            assert base is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], base)
    for node in reversed(nodes):
        graph.remove(node, safe=True)
    slots = [v for v in graph.inputs if (v.name or "").startswith((_PREFIX, "adapter_"))]
    for value in slots:
        graph.inputs.remove(value)
    for name in [name for name in graph.initializers if name.startswith(_PREFIX)]:
        del graph.initializers[name]
