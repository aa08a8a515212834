"""GPT-2 and the models that keep its layer norms."""

from __future__ import annotations

from dataclasses import replace

from lifecycle.graph.architectures.common import read_common
from lifecycle.graph.architectures.llama import with_window
from lifecycle.graph.feed_forward import ACTIVATIONS
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import BlockNorms, DecoderSpec, Layer, Mlp, Norm, TensorNames


def gpt2(fields: Fields) -> DecoderSpec:
    """GPT-2: learned positions, matrices stored as [in, out]."""
    fields = fields.called(
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="n_positions",
        intermediate_size="n_inner",
        hidden_act="activation_function",
        layer_norm_eps="layer_norm_epsilon",
    ).or_else(hidden_act="gelu_new", layer_norm_eps=1e-5, tie_word_embeddings=True)
    fields.require("scale_attn_weights", True)
    fields.require("scale_attn_by_inverse_layer_idx", False)
    size = fields.optional_integer("intermediate_size") or 4 * fields.integer("hidden_size")
    fields = replace(fields, values={**fields.values, "intermediate_size": size})
    spec = _with_layer_norms(fields)
    mlp = _plain_mlp(fields, bias=True)
    return replace(
        spec,
        layers=(Layer(mlp, rope=None),) * len(spec.layers),
        attention=replace(spec.attention, qkv_bias=True, o_bias=True),
        block_norms=BlockNorms("ln_1", None, "ln_2"),
        learned_positions="wpe",
        names=TensorNames(
            prefix="transformer.",
            changes={
                "embed_tokens": "wte",
                "layers": "h.{i}",
                "norm": "ln_f",
                "qkv_proj": "attn.c_attn",
                "o_proj": "attn.c_proj",
                "up_proj": "mlp.c_fc",
                "down_proj": "mlp.c_proj",
            },
            transposed=True,
            ignored=(".attn.bias", ".attn.masked_bias"),
        ),
    )


def gpt_neox(fields: Fields) -> DecoderSpec:
    """GPT-NeoX and Pythia: a quarter of each head rotated, attention and MLP side by side."""
    # Their usual names are not read.
    fields = fields.without("rope_theta", "partial_rotary_factor")
    fields = fields.called(
        rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct"
    ).or_else(
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.25,
        use_parallel_residual=True,
        attention_bias=True,
    )
    spec = _with_layer_norms(fields, partial_rotary=True)
    layer = spec.layers[0]
    mlp = _plain_mlp(fields, bias=True)
    return replace(
        spec,
        layers=(replace(layer, feed_forward=mlp),) * len(spec.layers),
        parallel=fields.flag("use_parallel_residual"),
        names=TensorNames(
            prefix="gpt_neox.",
            head="embed_out",
            changes={
                "embed_tokens": "embed_in",
                "norm": "final_layer_norm",
                "qkv_proj": "attention.query_key_value",
                "o_proj": "attention.dense",
                "up_proj": "mlp.dense_h_to_4h",
                "down_proj": "mlp.dense_4h_to_h",
            },
            heads_together=True,
            ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
        ),
    )


def stablelm(fields: Fields) -> DecoderSpec:
    """StableLM 2: Llama with layer norms, and a quarter of each head rotated."""
    fields = fields.or_else(num_key_value_heads=32, layer_norm_eps=1e-5, partial_rotary_factor=0.25)
    spec = _with_layer_norms(fields, partial_rotary=True)
    parallel = fields.flag("use_parallel_residual")
    own_norms = "own_heads" if fields.flag("qk_layernorm") else None
    return replace(
        spec,
        attention=replace(
            spec.attention,
            qkv_bias=fields.flag("use_qkv_bias"),
            o_bias=False,
            qk_norm=own_norms,
        ),
        parallel=parallel,
        block_norms=BlockNorms(before_mlp=None) if parallel else BlockNorms(),
        names=TensorNames(
            changes={
                "q_norm": "self_attn.q_layernorm.norms.{h}",
                "k_norm": "self_attn.k_layernorm.norms.{h}",
            }
        ),
    )


def starcoder2(fields: Fields) -> DecoderSpec:
    """StarCoder 2: layer norms, biases, a plain MLP, often a window."""
    fields = fields.called(layer_norm_eps="norm_epsilon").or_else(
        num_key_value_heads=2,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-5,
        use_bias=True,
        tie_word_embeddings=True,
    )
    fields.require("mlp_type", "default")
    fields.require("norm_type", "layer_norm")
    bias = fields.flag("use_bias")
    spec = with_window(_with_layer_norms(fields), fields.optional_integer("sliding_window"))
    layer = spec.layers[0]
    mlp = _plain_mlp(fields, bias=bias)
    return replace(
        spec,
        layers=(replace(layer, feed_forward=mlp),) * len(spec.layers),
        attention=replace(spec.attention, qkv_bias=bias, o_bias=bias),
        names=TensorNames(changes={"up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}),
    )


def _with_layer_norms(fields: Fields, partial_rotary: bool = False) -> DecoderSpec:
    norm = Norm(fields.number("layer_norm_eps"), "layer", bias=True)
    return replace(read_common(fields, partial_rotary), norm=norm)


def _plain_mlp(fields: Fields, bias: bool) -> Mlp:
    size = fields.integer("intermediate_size")
    return Mlp(size, fields.choice("hidden_act", ACTIVATIONS), gated=False, bias=bias)
