"""What the products of a decoder read, layer by layer, when it runs over calibration texts.

A layer whose matrices were replaced hands its successor what it gives with the new ones, so that
each layer is quantised for the inputs that it will get.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lifecycle.graph.pieces import Floats, Pieces


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
        self._moments: dict[str, Floats] = {}
        self._replaced: dict[str, Floats] = {}

    def second_moments(self, product: str) -> Floats:
        """Xᵀ·X, [in, in], over all that a product reads, as a mean over tokens. Products must be
        asked for in the order of the graph, layer after layer."""
        piece = self._pieces.holding[product]
        if piece < self._at:
            raise ValueError(f"{product} was passed; layers are walked once")
        while self._at < piece:
            self._leave()
            self._at += 1
            self._enter()
        return self._moments[self._reads[product]]

    def replace(self, product: str, weights: Floats) -> None:
        """Let a product of the current layer have other weights [out, in] from here on."""
        self._replaced[self._weight_of[product]] = weights

    def _enter(self) -> None:
        """Run the piece as it is, and keep the moments of what its products read."""
        pieces, at = self._pieces, self._at
        wanted = list(dict.fromkeys(node.input[0] for node in pieces.products(at)))
        self._moments.clear()
        if not wanted:
            return
        known = [name for name in wanted if name in pieces.outside(at)]
        made = [name for name in wanted if name not in known]
        session = pieces.session(at, made, {}) if made else None
        total = sum(len(batch.inputs["input_ids"]) for batch in pieces.batches)
        for batch in pieces.batches:
            found = {name: batch.live[name] for name in known}
            if session is not None:
                found |= pieces.run(session, at, batch, made, batch.live)
            for name, x in found.items():
                rows = x.reshape(-1, x.shape[-1])
                moments: Floats = (rows.T @ rows / total).astype(np.float32)
                before = self._moments.get(name)
                self._moments[name] = moments if before is None else before + moments

    def _leave(self) -> None:
        """Run the current piece as it has become, for what later pieces read of it."""
        if self._at < 0:
            return
        pieces, at = self._pieces, self._at
        session = pieces.session(at, pieces.handed_on(at), self._replaced)
        for batch in pieces.batches:
            batch.live = pieces.step(session, at, batch, batch.live)
        self._replaced.clear()
