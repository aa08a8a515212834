"""What the graph builder must know of a decoder, whatever its architecture is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from lifecycle.graph.rope import Rope


@dataclass(frozen=True, slots=True)
class Norm:
    """How activations are normalised."""

    epsilon: float
    kind: Literal["rms", "layer"] = "rms"
    """By the root of the mean square, or by mean and deviation."""
    bias: bool = False
    plus_one: bool = False
    """Whether checkpoints store the weights less 1."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention, the same in all layers but for what `Layer` says."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    qkv_bias: bool = False
    o_bias: bool = False
    scale: float | None = None
    """Factor on the products of queries and keys; None is head_size ** -0.5."""
    softcap: float | None = None
    """They are bent to stay within ± this."""
    qk_norm: Literal["head", "own_heads", "width"] | None = None
    """How queries and keys are normalised before the rotation: each head, by weights that all
    share or by its own, or all heads together."""

    @property
    def q_size(self) -> int:
        """Width of the queries of a token."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of the keys, or of the values, of a token."""
        return self.num_kv_heads * self.head_size


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) if not gated."""

    size: int
    activation: str = "silu"
    """A key of `lifecycle.graph.feed_forward.ACTIVATIONS`."""
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture: a router picks a few gated MLPs for each token and weighs their outputs."""

    count: int
    per_token: int
    size: int
    normalize: bool
    """Whether the weights of the picked ones are made to add up to 1."""
    activation: str = "silu"


@dataclass(frozen=True, slots=True)
class Layer:
    """What may differ between the layers of a model."""

    feed_forward: Mlp | Experts
    rope: Rope | None
    """None: the layer sees no positions."""
    window: int | None = None
    """Tokens that a token sees, itself included; None is all."""


@dataclass(frozen=True, slots=True)
class BlockNorms:
    """The names of a layer's norms in checkpoints; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


_LLAMA_NAMES = MappingProxyType(
    {
        "embed_tokens": "embed_tokens",
        "layers": "layers.{i}",
        "norm": "norm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "qkv_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "o_proj": "self_attn.o_proj",
        "gate_up_proj": "mlp.gate_proj mlp.up_proj",
        "up_proj": "mlp.up_proj",
        "down_proj": "mlp.down_proj",
        "router": "mlp.gate",
        "expert_gate": "mlp.experts.{e}.gate_proj",
        "expert_up": "mlp.experts.{e}.up_proj",
        "expert_down": "mlp.experts.{e}.down_proj",
    }
)


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How checkpoints call and lay out what the graph needs; Llama's way, unless said."""

    prefix: str = "model."
    """Of all but the head; also right where a checkpoint leaves it out."""
    head: str = "lm_head"
    changes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Our names to theirs, below the prefix, where they differ from Llama's. Several theirs,
    with spaces between, are joined row after row."""
    transposed: bool = False
    """Whether the matrices of the layers are stored as [in, out]."""
    heads_together: bool = False
    """Whether the rows of q, k and v are stored head by head: q, k, v of the first head …"""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of the names of tensors that hold no weights."""

    def of(self, part: str) -> str:
        """Their name, or names, of our `part`."""
        return self.changes.get(part) or _LLAMA_NAMES[part]


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder: embedding, layers of attention and feed-forward with residuals, output head."""

    architecture: str
    """`model_type` of the checkpoint."""
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    attention: Attention
    norm: Norm
    block_norms: BlockNorms = BlockNorms()
    parallel: bool = False
    """Whether attention and feed-forward read the same residual; else one after the other. If
    there is no norm before the feed-forward, it reads what the attention reads."""
    learned_positions: str | None = None
    """The name of a table of positions that is added to the embedding."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor on what a layer's two parts add to the residual."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    """Whether the output head is the embedding."""
    names: TensorNames = TensorNames()

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotations of the layers."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope))

    @property
    def long_context(self) -> int | None:
        """Tokens beyond which a text is rotated by the long tables; None if there are none."""
        return next((rope.long.beyond for rope in self.ropes if rope.long), None)
