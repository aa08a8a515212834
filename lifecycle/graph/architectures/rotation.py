"""Reading the rotary embedding of a config, in all its spellings."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt
from typing import NamedTuple

from lifecycle.graph.fields import Fields
from lifecycle.graph.rope import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongContext,
    Rope,
    Scaling,
    YarnScaling,
)


class _Scaled(NamedTuple):
    """What a kind of scaling comes to."""

    scaling: Scaling | None = None
    magnitude: float = 1.0
    long: LongContext | None = None


def read_rope(
    fields: Fields, head_size: int, interleaved: bool = False, partial: bool = False
) -> Rope:
    """Both spellings, the older `rope_scaling` before `rope_parameters`: so does transformers,
    whose files have a `rope_parameters` even where a `rope_scaling` was added by hand. `partial`:
    whether the architecture may rotate a part of each head."""
    scaling, parameters = fields.section("rope_scaling"), fields.section("rope_parameters")
    rope = (scaling if scaling.values else parameters).or_else(
        rope_theta=fields.values.get("rope_theta", 10_000.0),
        partial_rotary_factor=fields.values.get("partial_rotary_factor"),
    )
    if not partial and rope.values["partial_rotary_factor"] not in (None, 1.0):
        raise rope.wrong("partial_rotary_factor", "1.0: this architecture rotates whole heads")
    original = fields.values.get("original_max_position_embeddings")
    if original is not None:
        # Beside the rotation's own fields it counts more than among them.
        rope = Fields({**rope.values, "original_max_position_embeddings": original}, rope.where)
    return make_rope(fields, rope, head_size, interleaved)


def make_rope(fields: Fields, rope: Fields, head_size: int, interleaved: bool = False) -> Rope:
    """A rotation from its own fields; `fields` are those of the whole config."""
    longest = fields.integer("max_position_embeddings")
    original = fields.values.get("original_max_position_embeddings", longest)
    rope = rope.or_else(original_max_position_embeddings=original)
    rope = rope.or_else(rope_type=rope.values.get("type", "default"))
    part = rope.optional_number("partial_rotary_factor") or 1.0
    size = int(head_size * part)
    if part != 1 and (not 2 <= size <= head_size or size % 2):
        raise rope.wrong(
            "partial_rotary_factor", f"a part of heads of {head_size} that is even, at most 1"
        )
    kind = rope.choice("rope_type", _KINDS)
    scaled = _KINDS[kind](rope, longest, size)
    return Rope(
        theta=rope.number("rope_theta"),
        scaling=scaled.scaling,
        size=None if size == head_size else size,
        interleaved=interleaved,
        magnitude=scaled.magnitude,
        long=scaled.long,
    )


def _linear(rope: Fields, longest: int, size: int) -> _Scaled:
    return _Scaled(LinearScaling(rope.number("factor")))


def _llama3(rope: Fields, longest: int, size: int) -> _Scaled:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.wrong("high_freq_factor", f"more than low_freq_factor, {low}")
    original = rope.integer("original_max_position_embeddings")
    return _Scaled(Llama3Scaling(rope.number("factor"), low, high, original))


def _yarn(rope: Fields, longest: int, size: int) -> _Scaled:
    original = rope.integer("original_max_position_embeddings")
    factor = rope.optional_number("factor") or longest / original
    # What the paper, and after it DeepSeek, put on the scale of attention.
    above, below = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    magnitude = _mscale(factor, above) / _mscale(factor, below) if above and below else None
    return _Scaled(
        YarnScaling(
            factor,
            original,
            beta_fast=rope.optional_number("beta_fast") or 32.0,
            beta_slow=rope.optional_number("beta_slow") or 1.0,
            truncate=rope.or_else(truncate=True).flag("truncate"),
        ),
        rope.optional_number("attention_factor") or magnitude or _mscale(factor, 1.0),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0


def _longrope(rope: Fields, longest: int, size: int) -> _Scaled:
    original = rope.integer("original_max_position_embeddings")
    factor = rope.optional_number("factor") or longest / original
    magnitude = 1.0 if factor <= 1 else sqrt(1 + log(factor) / log(original))
    short, long = (FactorScaling(rope.numbers(f"{n}_factor", size // 2)) for n in ("short", "long"))
    return _Scaled(
        short,
        rope.optional_number("attention_factor") or magnitude,
        LongContext(long, original) if longest > original else None,
    )


_KINDS: dict[str, Callable[[Fields, int, int], _Scaled]] = {
    "default": lambda *_: _Scaled(),
    # It stretches wavelengths only for texts beyond max_position_embeddings, which nobody feeds.
    "dynamic": lambda *_: _Scaled(),
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    # What the first Phi-3 models called it.
    "su": _longrope,
}
