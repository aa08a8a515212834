"""What the products and the cache of a decoder get, layer by layer, when it runs over calibration texts.

A layer whose matrices were replaced hands its successor what it gives with the new ones, so that
each layer is quantised for the inputs that it will get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from lifecycle.graph.pieces import Floats, Pieces
from lifecycle.graph.rotation import Rotation


class Calibration:
    """A walk through the layers of an exported float32 decoder."""

    def __init__(self, folder: Path, texts: Sequence[Sequence[int]]) -> None:
        """`texts` are token ids; each is read from its beginning.

        Raises:
            StageError: there are no texts, or one is longer than the model can read.
        """
        self._pieces = Pieces(folder, texts)
        products = [n for i in range(len(self._pieces.nodes)) for n in self._pieces.products(i)]
        self._reads = {node.name: node.input[0] for node in products}
        self._weight_of = {node.name: node.input[1] for node in products}
        self._at = -1
        self._measured: dict[tuple[str, str], Floats] = {}
        self._replaced: dict[str, Floats] = {}

    def second_moments(self, product: str) -> Floats:
        """Xᵀ·X, [in, in], over all that a product reads, as a mean over tokens. Products must be
        asked for in the order of the graph, layer after layer."""
        total = sum(len(batch.inputs["input_ids"]) for batch in self._pieces.batches)

        def moments(rows: Floats) -> Floats:
            return (rows.T @ rows / total).astype(np.float32)

        return self._measure(product, "moments", moments, np.add)

    def largest(self, product: str) -> Floats:
        """The largest absolute value of each input of a product, [in]; in the order of the graph."""
        return self._measure(product, "largest", lambda rows: np.abs(rows).max(axis=0), np.maximum)

    def cached(self, layer: int) -> tuple[Floats, Floats]:
        """The keys, rotated, and the values that a layer stores of all tokens, text after text,
        [kv_heads, tokens, head_size] each; layers in order."""
        pieces = self._pieces
        self._go_to(pieces.holding[f"layers.{layer}.self_attn.attend"])
        names = [f"present.{layer}.{part}" for part in ("key", "value")]
        session = pieces.session(self._at, names, {})
        rows: tuple[list[Floats], list[Floats]] = ([], [])
        for batch in pieces.batches:
            found = pieces.run(session, batch, names, batch.live)
            for name, part in zip(names, rows, strict=True):
                lengths = batch.inputs["query_seqlens"]
                part += [row[:, :length] for row, length in zip(found[name], lengths, strict=True)]
        return np.concatenate(rows[0], axis=1), np.concatenate(rows[1], axis=1)

    def replace(self, product: str, weights: Floats) -> None:
        """Let a product of the current layer have other weights [out, in] from here on."""
        self._replaced[self._weight_of[product]] = weights

    def positions(self) -> NDArray[np.int64]:
        """Where in its text each token stands, [tokens], text after text."""
        batches = self._pieces.batches
        return np.concatenate([batch.inputs["position_ids"][:, 0] for batch in batches])

    def rotation(self, layer: int) -> Rotation | None:
        """How a layer rotates its keys; None if it does not."""
        pieces = self._pieces
        for node in pieces.nodes[pieces.holding[f"layers.{layer}.self_attn.attend"]]:
            known = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            is_fused = node.op_type == "GroupQueryAttention" and known["do_rotary"]
            if is_fused or node.op_type == "RotaryEmbedding":
                names = node.input[7:9] if is_fused else node.input[2:4]
                cos, sin = map(pieces.constant, names)
                marks = ("rotary_interleaved", "interleaved")
                return Rotation(cos, sin, any(known.get(mark) for mark in marks))
        return None

    def _go_to(self, piece: int) -> None:
        """Run all pieces before this one."""
        if piece < self._at:
            raise ValueError("a layer was passed; they are walked once")
        while self._at < piece:
            self._leave()
            self._at += 1

    def _measure(
        self,
        product: str,
        kind: str,
        measure: Callable[[Floats], Floats],
        combine: Callable[[Floats, Floats], Floats],
    ) -> Floats:
        """A measure of what a product reads, taken of the rows of each batch and combined. All
        products of a piece are measured in one run."""
        self._go_to(self._pieces.holding[product])
        if (kind, self._reads[product]) not in self._measured:
            self._read_inputs(kind, measure, combine)
        return self._measured[kind, self._reads[product]]

    def _read_inputs(
        self,
        kind: str,
        measure: Callable[[Floats], Floats],
        combine: Callable[[Floats, Floats], Floats],
    ) -> None:
        """Run the piece as it is, and measure what its products read."""
        pieces, at = self._pieces, self._at
        wanted = list(dict.fromkeys(node.input[0] for node in pieces.products(at)))
        known = [name for name in wanted if name in pieces.outside(at)]
        made = [name for name in wanted if name not in known]
        session = pieces.session(at, made, {}) if made else None
        for batch in pieces.batches:
            found = {name: batch.live[name] for name in known}
            if session is not None:
                found |= pieces.run(session, batch, made, batch.live)
            for name, x in found.items():
                value = measure(x.reshape(-1, x.shape[-1]))
                before = self._measured.get((kind, name))
                self._measured[kind, name] = value if before is None else combine(before, value)

    def _leave(self) -> None:
        """Run the current piece as it has become, for what later pieces read of it."""
        if self._at < 0:
            return
        pieces, at = self._pieces, self._at
        session = pieces.session(at, pieces.handed_on(at), self._replaced)
        for batch in pieces.batches:
            batch.live = pieces.step(session, at, batch, batch.live)
        self._replaced.clear()
        self._measured.clear()
