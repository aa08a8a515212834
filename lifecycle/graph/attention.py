"""The attention half of a layer: projections, norms of heads, rotation, the operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lifecycle.graph.parts import Parts
from lifecycle.graph.rope import Rope
from lifecycle.graph.spec import Layer
from lifecycle.graph.targets import Target
from lifecycle.graph.weights import WeightFile

INT64, INT32, FLOAT = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT
Tables = tuple[ir.Value, ir.Value]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of the graph that attention reads (see `lifecycle.engines.decoder`)."""

    position_ids: ir.Value | None
    pad_index: ir.Value
    unpad_index: ir.Value
    seqlens_k: ir.Value
    query_seqlens: ir.Value
    total_length: ir.Value


class AttentionBuilder:
    """Adds the attention of every layer of a model."""

    def __init__(self, parts: Parts, target: Target) -> None:
        self._parts, self._target = parts, target
        self._tables: dict[Rope, Tables] = {}

    @property
    def needs_positions(self) -> bool:
        """Whether some layer is rotated by nodes of its own, which read the positions."""
        return not all(map(self._is_fused, self._parts.spec.ropes))

    def add_tables(self, weights: WeightFile) -> None:
        """Write the tables of all rotations."""
        spec, g = self._parts.spec, self._parts.g
        for n, rope in enumerate(spec.ropes):
            prefix = "rope" if len(spec.ropes) == 1 else f"rope.{n}"
            values: list[ir.Value] = []
            for name, of in (("cos", np.cos), ("sin", np.sin)):
                shape, rows = rope.table(of, spec.max_position_embeddings, spec.attention.head_size)
                values.append(g.initializer(weights.add(f"{prefix}.{name}", FLOAT, shape, rows)))
            self._tables[rope] = (values[0], values[1])

    def add(self, i: int, x: ir.Value, inputs: StepInputs) -> ir.Value:
        """Attention of layer `i` over its cache, [T, hidden] to [T, hidden]."""
        parts, g, name = self._parts, self._parts.g, f"layers.{i}.self_attn"
        spec, sizes = parts.spec, parts.spec.attention
        layer = spec.layers[i]
        width = sizes.q_size + 2 * sizes.kv_size
        shape = (width, spec.hidden_size)
        qkv = parts.linear(f"{name}.qkv_proj", i, x, shape, sizes.qkv_bias)
        if sizes.qk_norm:
            qkv = self._norm_heads(name, i, qkv)
        if layer.rope and not self._is_fused(layer.rope):
            qkv = self._rotate(name, qkv, layer.rope, inputs)
        padded = g.node("Gather", f"{name}.pad", qkv, inputs.pad_index)
        attended = self._attend(i, padded, layer, inputs)
        packed = g.node("GatherND", f"{name}.unpad", attended, inputs.unpad_index)
        shape = (spec.hidden_size, sizes.q_size)
        return parts.linear(f"{name}.o_proj", i, packed, shape, sizes.o_bias)

    def _is_fused(self, rope: Rope) -> bool:
        """Whether the operator rotates by itself. It does not with tables of two contexts, since
        it counts positions from 0."""
        size = self._parts.spec.attention.head_size
        return rope.size is None and rope.long is None and self._target.fuses_rotary(size)

    def _attend(self, i: int, qkv: ir.Value, layer: Layer, inputs: StepInputs) -> ir.Value:
        """The attention operator: [B, S, q + k + v] to [B, S, q], present bound to past."""
        g, sizes = self._parts.g, self._parts.spec.attention
        cache_shape = ("B", sizes.num_kv_heads, "C", sizes.head_size)
        past = [
            g.input(f"past_key_values.{i}.{part}", FLOAT, cache_shape) for part in ("key", "value")
        ]
        is_fused = layer.rope is not None and self._is_fused(layer.rope)
        tables = self._tables[layer.rope] if layer.rope and is_fused else (None, None)
        operands = [qkv, None, None, *past, inputs.seqlens_k, inputs.total_length, *tables]
        # Positions, bias, sink, cache scales and q/k norm come between, and are not used.
        operands += [None] * 7
        name = f"layers.{i}.self_attn.attend"
        attended, key, value = g.nodes(
            "GroupQueryAttention",
            name,
            [*operands, inputs.query_seqlens],
            (name, f"present.{i}.key", f"present.{i}.value"),
            num_heads=sizes.num_heads,
            kv_num_heads=sizes.num_kv_heads,
            do_rotary=int(is_fused),
            local_window_size=layer.window or -1,
            **self._scores(layer, is_fused),
        )
        g.output(key, f"present.{i}.key", FLOAT, cache_shape)
        g.output(value, f"present.{i}.value", FLOAT, cache_shape)
        return attended

    def _scores(self, layer: Layer, is_fused: bool) -> dict[str, float | int]:
        """Attributes that differ from the operator's defaults."""
        sizes = self._parts.spec.attention
        found: dict[str, float | int] = {}
        if sizes.scale is not None:
            found["scale"] = sizes.scale
        if sizes.softcap is not None:
            found["softcap"] = sizes.softcap
        if is_fused and layer.rope and layer.rope.interleaved:
            found["rotary_interleaved"] = 1
        return found

    def _norm_heads(self, name: str, i: int, qkv: ir.Value) -> ir.Value:
        """Queries and keys normalised. As nodes: the CPU attention has no such input."""
        g, sizes = self._parts.g, self._parts.spec.attention
        split = g.integers("split.qkv", sizes.q_size, sizes.kv_size, sizes.kv_size)
        outputs = [f"{name}.{part}" for part in "qkv"]
        q, k, v = g.nodes("Split", f"{name}.split_heads", (qkv, split), outputs, axis=-1)
        normed = [
            self._norm_part(name, i, part, value, heads)
            for part, value, heads in (("q", q, sizes.num_heads), ("k", k, sizes.num_kv_heads))
        ]
        return g.node("Concat", f"{name}.join_heads", *normed, v, axis=-1)

    def _norm_part(self, name: str, i: int, part: str, x: ir.Value, heads: int) -> ir.Value:
        """[T, heads * size], all together or head by head."""
        parts, g, sizes = self._parts, self._parts.g, self._parts.spec.attention
        norm_name, size = f"{name}.{part}_norm", sizes.head_size
        source = parts.source.layer_name(i, parts.spec.names.of(f"{part}_norm"))
        if sizes.qk_norm == "width":
            return parts.norm(norm_name, source, x, heads * size)
        # 0 keeps the dimension T.
        shape = g.integers(f"shape.{part}_heads", 0, heads, size)
        rows = g.node("Reshape", f"{name}.{part}_heads", x, shape)
        if sizes.qk_norm == "head":
            rows = parts.norm(norm_name, source, rows, size)
        else:
            ones = g.constant("norm.ones", np.ones(size, np.float32))
            epsilon = parts.spec.norm.epsilon
            rows = g.node("LayerNormalization", norm_name, rows, ones, epsilon=epsilon)
            own = parts.source.head_norms(norm_name, i, f"{part}_norm", heads, size)
            rows = g.node("Mul", f"{norm_name}.scaled", rows, g.initializer(own))
        whole = g.integers(f"shape.{part}", 0, heads * size)
        return g.node("Reshape", f"{name}.{part}_normed", rows, whole)

    def _rotate(self, name: str, qkv: ir.Value, rope: Rope, inputs: StepInputs) -> ir.Value:
        """Queries and keys rotated in one node: to it, keys are just more heads."""
        g, sizes = self._parts.g, self._parts.spec.attention
        split = g.integers("split.rotary", sizes.q_size + sizes.kv_size, sizes.kv_size)
        outputs = (f"{name}.qk", f"{name}.unrotated_v")
        qk, v = g.nodes("Split", f"{name}.split_rotary", (qkv, split), outputs, axis=-1)
        # As T sequences of one token: the operator refuses a sequence longer than its tables.
        axis = g.integers("axis.token", 1)
        batch = g.node("Unsqueeze", f"{name}.qk_batch", qk, axis)
        attributes: dict[str, int] = {}
        if rope.size is not None:
            heads = sizes.num_heads + sizes.num_kv_heads
            attributes = {"rotary_embedding_dim": rope.size, "num_heads": heads}
        if rope.interleaved:
            attributes["interleaved"] = 1
        rotated = g.node(
            "RotaryEmbedding",
            f"{name}.rotary",
            *(batch, inputs.position_ids, *self._tables[rope]),
            **attributes,
        )
        rows = g.node("Squeeze", f"{name}.qk_rows", rotated, axis)
        return g.node("Concat", f"{name}.join_rotary", rows, v, axis=-1)
