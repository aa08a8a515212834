"""Writes the graph of a decoder from its spec, streaming the weights.

Tokens are packed: activations are [T, width], rows of all sequences one after another. Only
attention needs them laid out per sequence, [B, S, width]; a Gather before it and one after it
go there and back. No node hides the dimension T from shape inference: ONNX Runtime reuses the
memory of a value only for one whose shape it knows to be the same.
"""

from __future__ import annotations

import onnx_ir as ir

from lifecycle.engines.adapters import AdapterLayout
from lifecycle.graph.adapters import AdapterSlots
from lifecycle.graph.attention import FLOAT, INT32, INT64, AttentionBuilder, StepInputs
from lifecycle.graph.feed_forward import feed_forward
from lifecycle.graph.hidden import WANTED, read_hidden
from lifecycle.graph.nodes import GraphNodes
from lifecycle.graph.parts import Parts
from lifecycle.graph.spec import DecoderSpec
from lifecycle.graph.targets import Target
from lifecycle.graph.tensors import TensorSource
from lifecycle.graph.weights import WeightFile


def build_decoder(
    spec: DecoderSpec,
    source: TensorSource,
    weights: WeightFile,
    target: Target,
    slots: tuple[int, int] | None = None,
    hidden_states: bool = False,
) -> tuple[ir.Graph, AdapterLayout | None]:
    """The graph that `lifecycle.engines.decoder` describes; with `slots`, a number of LoRA adapters
    and their rank, that of `lifecycle.engines.adapters`; with `hidden_states`, one that gives them too.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the spec says.
    """
    builder = _DecoderBuilder(spec, source, weights, target, slots)
    graph = builder.build()
    if hidden_states:
        read_hidden(builder.g, spec.hidden_size)
    return graph, builder.slots.layout if builder.slots else None


class _DecoderBuilder:
    def __init__(
        self,
        spec: DecoderSpec,
        source: TensorSource,
        weights: WeightFile,
        target: Target,
        slots: tuple[int, int] | None,
    ) -> None:
        self.spec, self.source, self.weights = spec, source, weights
        self.g = GraphNodes()
        self.slots = AdapterSlots(self.g, *slots) if slots else None
        self.parts = Parts(spec, source, self.g, self.slots)
        self.attention = AttentionBuilder(self.parts, target)

    def build(self) -> ir.Graph:
        tokens, logit_index, inputs = self._inputs()
        self.attention.add_tables(self.weights)
        embedding = self.g.initializer(self.source.embedding())
        residual = self._embed(embedding, tokens, inputs)
        # What a layer added to the residual and the next norm is yet to add.
        added: ir.Value | None = None
        for i in range(len(self.spec.layers)):
            added, residual = self._layer(i, added, residual, inputs)
        name = self.spec.names.of("norm")
        normed, _ = self._norm_sum("norm", name, added, residual)
        self._head(normed, embedding, logit_index)
        return self.g.graph

    def _inputs(self) -> tuple[ir.Value, ir.Value, StepInputs]:
        g = self.g
        tokens = g.input("input_ids", INT64, ("T",))
        needs_positions = self.attention.needs_positions or self.spec.learned_positions
        positions = g.input("position_ids", INT64, ("T", 1)) if needs_positions else None
        pad_index = g.input("pad_index", INT64, ("B", "S"))
        unpad_index = g.input("unpad_index", INT64, ("T", 2))
        logit_index = g.input("logit_index", INT64, ("L",))
        seqlens_k = g.input("seqlens_k", INT32, ("B",))
        query_seqlens = g.input("query_seqlens", INT32, ("B",))
        total = g.input("total_sequence_length", INT32, (1,))
        step = StepInputs(positions, pad_index, unpad_index, seqlens_k, query_seqlens, total)
        return tokens, logit_index, step

    def _embed(self, table: ir.Value, tokens: ir.Value, inputs: StepInputs) -> ir.Value:
        g, spec = self.g, self.spec
        rows = g.node("Gather", "embed_tokens", table, tokens)
        rows = self.parts.scaled("embed_tokens.scaled", rows, spec.embedding_scale)
        if spec.learned_positions is None:
            return rows
        positions = g.initializer(self.source.positions(spec.learned_positions))
        axis = g.integers("axis.token", 1)
        flat = g.node("Squeeze", "positions.flat", inputs.position_ids, axis)
        return g.node("Add", "embedded", rows, g.node("Gather", "positions", positions, flat))

    def _layer(
        self, i: int, added: ir.Value | None, residual: ir.Value, inputs: StepInputs
    ) -> tuple[ir.Value, ir.Value]:
        """What the layer adds to the residual last, and the residual without it."""
        norms = self.spec.block_norms
        read, residual = self._norm_before(i, norms.before_attention, added, residual)
        attended = self.attention.add(i, read, inputs)
        attended = self._norm_after(i, "self_attn", norms.after_attention, attended)
        if not self.spec.parallel:
            read, residual = self._norm_before(i, norms.before_mlp, attended, residual)
        elif norms.before_mlp:
            read, _ = self._norm_before(i, norms.before_mlp, None, residual)
        fed = feed_forward(self.parts, i, read)
        fed = self._norm_after(i, "mlp", norms.after_mlp, fed)
        if self.spec.parallel:
            fed = self.g.node("Add", f"layers.{i}.both", attended, fed)
        return fed, residual

    def _norm_before(
        self, i: int, norm: str | None, added: ir.Value | None, residual: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """What a part of a layer reads, and the residual with all that was added to it."""
        if norm is not None:
            name = self.source.layer_name(i, norm)
            return self._norm_sum(f"layers.{i}.{norm}", name, added, residual)
        if added is not None:
            residual = self.g.node("Add", f"{added.name}.residual", added, residual)
        return residual, residual

    def _norm_sum(
        self, name: str, source: str, added: ir.Value | None, residual: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        if added is None:
            return self.parts.norm(name, source, residual, self.spec.hidden_size), residual
        return self.parts.add_norm(name, source, added, residual)

    def _norm_after(self, i: int, part: str, norm: str | None, x: ir.Value) -> ir.Value:
        if norm is not None:
            name = self.source.layer_name(i, norm)
            x = self.parts.norm(f"layers.{i}.{norm}", name, x, self.spec.hidden_size)
        return self.parts.scaled(f"layers.{i}.{part}.scaled", x, self.spec.residual_scale)

    def _head(self, normed: ir.Value, embedding: ir.Value, logit_index: ir.Value) -> None:
        """The logits of the wanted tokens, [L, vocab]."""
        g, spec, cap = self.g, self.spec, self.spec.logit_softcap
        wanted = g.node("Gather", WANTED, normed, logit_index)
        # Before the product: the hidden states are narrower than the logits.
        wanted = self.parts.scaled("wanted.scaled", wanted, spec.logit_scale / (cap or 1))
        head = embedding if spec.tied_embeddings else g.initializer(self.source.head())
        logits = g.node("Gemm", "lm_head", wanted, head, transB=1)
        if cap is not None:
            logits = self.parts.scaled(
                "lm_head.capped", g.node("Tanh", "lm_head.bent", logits), cap
            )
        g.output(logits, "logits", FLOAT, ("L", spec.vocab_size))
