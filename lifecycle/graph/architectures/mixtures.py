"""Mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from lifecycle.graph.architectures.common import read_common
from lifecycle.graph.architectures.llama import with_window
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import DecoderSpec, Experts, TensorNames


def mixtral(fields: Fields) -> DecoderSpec:
    """Mixtral: Mistral with two of eight MLPs per token."""
    fields = fields.called(num_local_experts="num_experts").or_else(
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1_000_000.0,
        num_experts_per_tok=2,
        num_local_experts=8,
    )
    spec = read_common(fields)
    experts = _experts(fields, "num_local_experts", "intermediate_size", normalize=True)
    layer = replace(spec.layers[0], feed_forward=experts)
    moe = "block_sparse_moe"
    spec = replace(
        spec,
        layers=(layer,) * len(spec.layers),
        names=TensorNames(
            changes={
                "router": f"{moe}.gate",
                "expert_gate": f"{moe}.experts.{{e}}.w1",
                "expert_up": f"{moe}.experts.{{e}}.w3",
                "expert_down": f"{moe}.experts.{{e}}.w2",
            }
        ),
    )
    return with_window(spec, fields.optional_integer("sliding_window"))


def qwen3_moe(fields: Fields) -> DecoderSpec:
    """Qwen 3's mixtures: Qwen 3 with eight of 128 MLPs per token, in all layers or in some."""
    fields = fields.called(num_experts="num_local_experts").or_else(
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        decoder_sparse_step=1,
    )
    spec = read_common(fields)
    spec = replace(spec, attention=replace(spec.attention, qk_norm="head"))
    if fields.flag("use_sliding_window"):
        window = fields.or_else(sliding_window=4096).optional_integer("sliding_window")
        spec = with_window(spec, window)
    normalize = fields.flag("norm_topk_prob")
    experts = _experts(fields, "num_experts", "moe_intermediate_size", normalize)
    dense = fields.indices("mlp_only_layers", len(spec.layers))
    every = fields.integer("decoder_sparse_step")
    return replace(
        spec,
        layers=tuple(
            replace(layer, feed_forward=experts)
            if i not in dense and (i + 1) % every == 0
            else layer
            for i, layer in enumerate(spec.layers)
        ),
    )


def _experts(fields: Fields, count: str, size: str, normalize: bool) -> Experts:
    experts = Experts(
        count=fields.integer(count),
        per_token=fields.integer("num_experts_per_tok"),
        size=fields.integer(size),
        normalize=normalize,
        activation=fields.or_else(hidden_act="silu").choice("hidden_act", ("silu",)),
    )
    if experts.per_token > experts.count:
        raise fields.wrong("num_experts_per_tok", f"at most {count}, {experts.count}")
    return experts
