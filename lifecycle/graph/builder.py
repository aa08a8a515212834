"""Writes the graph of a decoder from its spec, streaming the weights.

Tokens are packed: activations are [T, width], rows of all sequences one after another. Only
attention needs them laid out per sequence, [B, S, width]; a Gather before it and one after it
go there and back. No node hides the dimension T from shape inference: ONNX Runtime reuses the
memory of a value only for one whose shape it knows to be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from lifecycle.graph.checkpoint import Checkpoint
from lifecycle.graph.nodes import GraphNodes
from lifecycle.graph.spec import DecoderSpec
from lifecycle.graph.targets import Target
from lifecycle.graph.weights import WeightFile, copy_tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The tensors of a checkpoint that tied embeddings make one."""
INT64, INT32, FLOAT = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT

_ACTIVATION_OPS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("QuickGelu", {"alpha": 1.0}),
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


def build_decoder(
    spec: DecoderSpec, checkpoint: Checkpoint, weights: WeightFile, target: Target
) -> ir.Graph:
    """The graph that `lifecycle.engines.decoder` describes.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the spec says.
    """
    return _DecoderBuilder(spec, checkpoint, weights, target).build()


class _DecoderBuilder:
    def __init__(
        self, spec: DecoderSpec, checkpoint: Checkpoint, weights: WeightFile, target: Target
    ) -> None:
        self.spec = spec
        self.checkpoint = checkpoint
        self.weights = weights
        self.fused_rotary = target.fuses_rotary(spec.head_size)
        self.g = GraphNodes()

    def build(self) -> ir.Graph:
        self._inputs()
        spec = self.spec
        embedding = self._embedding()
        residual = self.g.node("Gather", "embed_tokens", embedding, self.tokens)
        normed = self._norm("layers.0.input_layernorm", residual, spec.hidden_size)
        for i in range(spec.num_layers):
            last = i == spec.num_layers - 1
            attended = self._attention(i, normed)
            normed, residual = self._add_norm(
                f"layers.{i}.post_attention_layernorm", attended, residual
            )
            after = "norm" if last else f"layers.{i + 1}.input_layernorm"
            normed, residual = self._add_norm(after, self._mlp(i, normed), residual)
        self._head(normed, embedding)
        return self.g.graph

    def _embedding(self) -> ir.Value:
        shape, tensors = (self.spec.vocab_size, self.spec.hidden_size), self.checkpoint.tensors
        # Of two tied matrices a checkpoint may hold either.
        head_only = EMBEDDING not in tensors and HEAD in tensors and self.spec.tied_embeddings
        return self._weight("embed_tokens.weight", shape, [HEAD if head_only else EMBEDDING])

    def _inputs(self) -> None:
        g = self.g
        self.tokens = g.input("input_ids", INT64, ("T",))
        if not self.fused_rotary:
            self.position_ids = g.input("position_ids", INT64, ("T", 1))
        self.pad_index = g.input("pad_index", INT64, ("B", "S"))
        self.unpad_index = g.input("unpad_index", INT64, ("T", 2))
        self.logit_index = g.input("logit_index", INT64, ("L",))
        self.seqlens_k = g.input("seqlens_k", INT32, ("B",))
        self.query_seqlens = g.input("query_seqlens", INT32, ("B",))
        self.total_length = g.input("total_sequence_length", INT32, (1,))
        self._rope_tables()

    def _rope_tables(self) -> None:
        spec = self.spec
        cos, sin = spec.rope.tables(spec.max_position_embeddings, spec.head_size)
        self.rope = tuple(
            self.g.initializer(self.weights.add_array(f"rope.{name}", table))
            for name, table in (("cos", cos), ("sin", sin))
        )

    def _attention(self, i: int, x: ir.Value) -> ir.Value:
        """Grouped-query attention of layer `i` over its cache, [T, hidden] to [T, hidden]."""
        g, spec, name = self.g, self.spec, f"layers.{i}.self_attn"
        width = spec.q_size + 2 * spec.kv_size
        qkv = self._linear(
            f"{name}.qkv_proj",
            x,
            ("q_proj", "k_proj", "v_proj"),
            (width, spec.hidden_size),
            spec.qkv_bias,
        )
        if spec.qk_norm:
            qkv = self._norm_heads(name, qkv)
        if not self.fused_rotary:
            qkv = self._rotate(name, qkv)
        padded = g.node("Gather", f"{name}.pad", qkv, self.pad_index)
        attended = self._attend(i, padded)
        packed = g.node("GatherND", f"{name}.unpad", attended, self.unpad_index)
        return self._linear(
            f"{name}.o_proj", packed, ("o_proj",), (spec.hidden_size, spec.q_size), spec.o_bias
        )

    def _attend(self, i: int, qkv: ir.Value) -> ir.Value:
        """The attention operator: [B, S, q + k + v] to [B, S, q], present bound to past."""
        g, spec = self.g, self.spec
        cache_shape = ("B", spec.num_kv_heads, "C", spec.head_size)
        past = [
            g.input(f"past_key_values.{i}.{part}", FLOAT, cache_shape) for part in ("key", "value")
        ]
        tables = self.rope if self.fused_rotary else (None, None)
        inputs = [qkv, None, None, *past, self.seqlens_k, self.total_length, *tables]
        # Positions, bias, sink, cache scales and q/k norm come between, and are not used.
        inputs += [None] * 7
        name = f"layers.{i}.self_attn.attend"
        attended, key, value = g.nodes(
            "GroupQueryAttention",
            name,
            [*inputs, self.query_seqlens],
            (name, f"present.{i}.key", f"present.{i}.value"),
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=int(self.fused_rotary),
            local_window_size=spec.sliding_window or -1,
        )
        g.output(key, f"present.{i}.key", FLOAT, cache_shape)
        g.output(value, f"present.{i}.value", FLOAT, cache_shape)
        return attended

    def _norm_heads(self, name: str, qkv: ir.Value) -> ir.Value:
        """Queries and keys normalised per head. As nodes: the CPU attention has no such input."""
        g, spec = self.g, self.spec
        sizes = g.integers("split.qkv", spec.q_size, spec.kv_size, spec.kv_size)
        parts = [f"{name}.{part}" for part in "qkv"]
        q, k, v = g.nodes("Split", f"{name}.split_heads", (qkv, sizes), parts, axis=-1)
        normed: list[ir.Value] = []
        for part, value, size in (("q", q, spec.q_size), ("k", k, spec.kv_size)):
            # 0 keeps the dimension T.
            heads = g.integers(f"shape.{part}_heads", 0, size // spec.head_size, spec.head_size)
            rows = g.node("Reshape", f"{name}.{part}_heads", value, heads)
            rows = self._norm(f"{name}.{part}_norm", rows, spec.head_size)
            whole = g.integers(f"shape.{part}", 0, size)
            normed.append(g.node("Reshape", f"{name}.{part}_normed", rows, whole))
        return g.node("Concat", f"{name}.join_heads", *normed, v, axis=-1)

    def _rotate(self, name: str, qkv: ir.Value) -> ir.Value:
        """Queries and keys rotated in one node: to it, keys are just more heads."""
        g, spec = self.g, self.spec
        rotated_size = spec.q_size + spec.kv_size
        sizes = g.integers("split.rotary", rotated_size, spec.kv_size)
        parts = (f"{name}.qk", f"{name}.unrotated_v")
        qk, v = g.nodes("Split", f"{name}.split_rotary", (qkv, sizes), parts, axis=-1)
        # As T sequences of one token: the operator refuses a sequence longer than its tables.
        axis = g.integers("axis.token", 1)
        batch = g.node("Unsqueeze", f"{name}.qk_batch", qk, axis)
        rotated = g.node("RotaryEmbedding", f"{name}.rotary", batch, self.position_ids, *self.rope)
        rows = g.node("Squeeze", f"{name}.qk_rows", rotated, axis)
        return g.node("Concat", f"{name}.join_rotary", rows, v, axis=-1)

    def _mlp(self, i: int, x: ir.Value) -> ir.Value:
        """down(activation(gate(x)) * up(x)), gate and up in one product."""
        g, spec, name = self.g, self.spec, f"layers.{i}.mlp"
        size = spec.intermediate_size
        both = self._linear(
            f"{name}.gate_up_proj",
            x,
            ("gate_proj", "up_proj"),
            (2 * size, spec.hidden_size),
            spec.mlp_bias,
        )
        halves = g.integers("split.gate_up", size, size)
        gate, up = g.nodes(
            "Split", f"{name}.split", (both, halves), (f"{name}.gate", f"{name}.up"), axis=-1
        )
        gated = g.node("Mul", f"{name}.gated", self._activation(f"{name}.act", gate), up)
        return self._linear(
            f"{name}.down_proj", gated, ("down_proj",), (spec.hidden_size, size), spec.mlp_bias
        )

    def _activation(self, name: str, x: ir.Value) -> ir.Value:
        op, attributes = _ACTIVATION_OPS[self.spec.activation]
        return self.g.node(op, name, x, **attributes)

    def _head(self, normed: ir.Value, embedding: ir.Value) -> None:
        """The logits of the wanted tokens, [L, vocab]."""
        g, spec = self.g, self.spec
        wanted = g.node("Gather", "wanted", normed, self.logit_index)
        head = embedding
        if not spec.tied_embeddings:
            shape = (spec.vocab_size, spec.hidden_size)
            head = self._weight(HEAD, shape, [HEAD])
        logits = g.node("Gemm", "lm_head", wanted, head, transB=1)
        g.output(logits, "logits", FLOAT, ("L", spec.vocab_size))

    def _linear(
        self, name: str, x: ir.Value, sources: Sequence[str], shape: tuple[int, int], bias: bool
    ) -> ir.Value:
        """x · Wᵀ + b, W of `shape` [out, in]: projections of the checkpoint, rows after rows.

        Gemm with transB takes weights as checkpoints store them, so they are copied, not
        transposed. ONNX Runtime packs them at load; decode and prefill are as fast as MatMul on
        transposed weights (2048×2048, 1/8/128 tokens: 0.18/0.65/7.5 ms against 0.20/1.0/7.1).
        """
        parent = f"model.{name.rpartition('.')[0]}"
        names = [f"{parent}.{source}" for source in sources]
        inputs = [x, self._weight(f"{name}.weight", shape, [f"{n}.weight" for n in names])]
        if bias:
            inputs.append(self._weight(f"{name}.bias", shape[:1], [f"{n}.bias" for n in names]))
        return self.g.node("Gemm", name, *inputs, transB=1)

    def _norm(self, name: str, x: ir.Value, size: int) -> ir.Value:
        scale = self._weight(f"{name}.weight", (size,))
        return self.g.node("RMSNormalization", name, x, scale, epsilon=self.spec.norm_eps)

    def _add_norm(self, name: str, x: ir.Value, residual: ir.Value) -> Sequence[ir.Value]:
        """The sum of both, normalised, and the sum itself."""
        scale = self._weight(f"{name}.weight", (self.spec.hidden_size,))
        outputs = self.g.nodes(
            "SkipSimplifiedLayerNormalization",
            name,
            (x, residual, scale),
            (name, "", "", f"{name}.residual"),
            epsilon=self.spec.norm_eps,
        )
        return outputs[0], outputs[3]

    def _weight(
        self, name: str, shape: tuple[int, ...], sources: Sequence[str] | None = None
    ) -> ir.Value:
        """A constant from the checkpoint, by default of the same name below `model.`."""
        sources = sources or [f"model.{name}"]
        return self.g.initializer(copy_tensor(self.checkpoint, sources, self.weights, name, shape))
