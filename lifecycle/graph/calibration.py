"""What the products and the cache of a decoder get, layer by layer, when it runs over calibration texts.

What follows a product that was replaced gets what the new weights give, so that each product is
quantised for the inputs that it will get; what it would have got is known beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lifecycle.errors import StageError
from lifecycle.graph.pieces import Floats, Pieces, Values
from lifecycle.graph.rotation import Rotation
from lifecycle.graph.routing import Routed, routing_shares

_ADDING = ("Add", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
"""Operators that add their first two inputs."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a product reads, x, beside what it would read had nothing been replaced, x + d. Means over
    tokens."""

    moments: Floats
    """Xᵀ·X, [in, in]."""
    missed: Floats
    """Dᵀ·X, [in, in]."""
    missed_beside: Floats | None
    """The same of what is added to the product's output by the next operator, which has its errors too,
    [out, in]; None if nothing is, as where a norm or a factor stands between."""


class Calibration:
    """A walk through the layers of an exported float32 decoder."""

    def __init__(
        self, folder: Path, texts: Sequence[Sequence[int]], scratch: Path | None = None
    ) -> None:
        """`texts` are token ids; each is read from its beginning. What layers make of them is kept in files in
        `scratch`, by default where the system keeps such files.

        Raises:
            StageError: there are no texts, or one is longer than the model can read.
        """
        self._pieces = Pieces(folder, texts, scratch=scratch)
        products = [n for i in range(len(self._pieces.nodes)) for n in self._pieces.products(i)]
        nodes = (node for piece in self._pieces.nodes for node in piece)
        self._mixtures = {node.name: node for node in nodes if node.op_type == "MoE"}
        self.visits: dict[str, NDArray[np.int64]] = {}
        """How many tokens each expert gets, by the names of the mixtures that were passed."""
        self._reads = {node.name: node.input[0] for node in products}
        self._weight_of = {node.name: node.input[1] for node in products}
        self._at = -1
        self._measured: dict[tuple[str, str], Floats] = {}
        self._replaced: dict[str, Floats] = {}
        self._exact: list[Values] | None = None
        """What would be live before the current piece had nothing been replaced; None if nothing
        was before it."""

    def second_moments(self, product: str) -> Floats:
        """Xᵀ·X, [in, in], over all that a product reads, as a mean over tokens. Products must be
        asked for in the order of the graph, layer after layer.

        Raises:
            StageError: it is not finite; also of `inputs` and `largest`.
        """

        def moments(rows: Floats) -> Floats:
            return rows.T @ rows / np.float32(self._tokens)

        return self._measure(product, "moments", moments, np.add)

    def inputs(self, product: str) -> Inputs | None:
        """What a product reads now that those before it, also of its own layer, are replaced; None if
        none is. Products must be asked for in the order of the graph."""
        pieces = self._pieces
        self._go_to(pieces.holding[product])
        if self._exact is None and not self._replaced:
            return None
        x, beside = self._reads[product], self._added_to(product)
        names = [x] if beside is None else [x, beside]
        now = self._values(names, self._replaced, self._live)
        exact = self._values(names, {}, self._exact or self._live)
        sums: dict[str, Floats] = {}

        def add(name: str, left: Floats, right: Floats) -> None:
            value = left.T @ right
            sums[name] = value if name not in sums else np.add(sums[name], value, out=value)

        for found, wanted in zip(now, exact, strict=True):
            rows = _rows(found[x])
            add("moments", rows, rows)
            add("missed", _rows(wanted[x]) - rows, rows)
            if beside is not None:
                add("beside", _rows(wanted[beside]) - _rows(found[beside]), rows)
        for total in sums.values():
            total /= np.float32(self._tokens)
        require_finite(sums, f"what {product} reads")
        return Inputs(sums["moments"], sums["missed"], sums.get("beside"))

    def largest(self, product: str) -> Floats:
        """The largest absolute value of each input of a product, [in]; in the order of the graph."""
        return self._measure(product, "largest", lambda rows: np.abs(rows).max(axis=0), np.maximum)

    def routed(self, mixture: str) -> Routed:
        """What a mixture reads now that those before it are replaced, and which of its experts get it; in the
        order of the graph.

        Raises:
            StageError: it is not finite.
        """
        pieces, node = self._pieces, self._mixtures[mixture]
        self._go_to(pieces.holding[mixture])
        x, logits = node.input[:2]
        known = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        per_token, normalize = known["k"], bool(known["normalize_routing_weights"])
        rows: list[Floats] = []
        shares: list[Floats] = []
        for found in self._values([x, logits], self._replaced, self._live):
            require_finite(found, f"what {mixture} reads")
            rows.append(pieces.kept(_rows(found[x])))
            shares.append(routing_shares(_rows(found[logits]), per_token, normalize))
        routed = Routed(rows, shares)
        self.visits[mixture] = routed.counts()
        return routed

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
        keys, values = (np.concatenate(part, axis=1) for part in rows)
        require_finite(dict(zip(names, (keys, values), strict=True)), f"what layer {layer} caches")
        return keys, values

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
        found = self._measured[kind, self._reads[product]]
        require_finite({kind: found}, f"what {product} reads")
        return found

    def _read_inputs(
        self,
        kind: str,
        measure: Callable[[Floats], Floats],
        combine: Callable[[Floats, Floats], Floats],
    ) -> None:
        """Run the piece as it is, and measure what its products read."""
        pieces, at = self._pieces, self._at
        wanted = list(dict.fromkeys(node.input[0] for node in pieces.products(at)))
        for found in self._values(wanted, {}, self._live):
            for name, x in found.items():
                value = measure(_rows(x))
                before = self._measured.get((kind, name))
                self._measured[kind, name] = value if before is None else combine(before, value)

    def _values(
        self, names: Sequence[str], changed: dict[str, Floats], states: Sequence[Values]
    ) -> Iterator[Values]:
        """What the current piece reads or makes under `names`, of each batch, from what is live before
        it."""
        pieces, at = self._pieces, self._at
        made = [name for name in names if name not in states[0]]
        session = pieces.session(at, made, changed) if made else None
        for batch, live in zip(pieces.batches, states, strict=True):
            found = {name: live[name] for name in names if name in live}
            if session is not None:
                found |= pieces.run(session, batch, made, live)
            yield found

    def _added_to(self, product: str) -> str | None:
        """What the output of a product is added to, as long as it is there before the product."""
        pieces = self._pieces
        nodes = pieces.nodes[self._at]
        at = next(i for i, node in enumerate(nodes) if node.name == product)
        there = {name for node in nodes[:at] for name in node.output}
        there |= pieces.batches[0].live.keys()
        output = nodes[at].output[0]
        adders = (n for part in pieces.nodes[self._at :] for n in part if output in n.input)
        operands = [n.input[:2] for n in adders if n.op_type in _ADDING]
        others = [name for pair in operands for name in pair if name != output and name in there]
        return others[0] if len(operands) == 1 and others else None

    @property
    def _live(self) -> list[Values]:
        """What is live before the current piece."""
        return [batch.live for batch in self._pieces.batches]

    @property
    def _tokens(self) -> int:
        return sum(len(batch.inputs["input_ids"]) for batch in self._pieces.batches)

    def _leave(self) -> None:
        """Run the current piece as it has become, for what later pieces read of it, and as it was."""
        if self._at < 0:
            return
        pieces = self._pieces
        if self._exact is None and self._replaced:
            self._exact = self._live
        if self._exact is not None:
            for i, exact in enumerate(self._stepped({}, self._exact)):
                self._exact[i] = exact
        live = self._stepped(self._replaced, (batch.live for batch in pieces.batches))
        for batch, after in zip(pieces.batches, live, strict=True):
            batch.live = after
        self._replaced.clear()
        self._measured.clear()

    def _stepped(self, changed: dict[str, Floats], states: Iterable[Values]) -> Iterator[Values]:
        """What is live behind the current piece, batch by batch, so that each takes the place of what was before it."""
        pieces, at = self._pieces, self._at
        session = pieces.session(at, pieces.handed_on(at), changed)
        for batch, live in zip(pieces.batches, states, strict=True):
            yield pieces.step(session, at, batch, live)


def require_finite(found: Mapping[Any, Floats], what: str) -> None:
    """
    Raises:
        StageError: some of what was found on calibration texts is not.
    """
    if not all(np.isfinite(values).all() for values in found.values()):
        raise StageError(
            f"{what} on the calibration texts is not finite, or too large to be squared in "
            "float32: the weights before it are damaged"
        )


def _rows(values: NDArray[Any]) -> Floats:
    return values.reshape(-1, values.shape[-1])
