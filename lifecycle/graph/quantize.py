"""From a float32 graph folder to a quantised one, product by product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from lifecycle.engines.decoder import GRAPH, WEIGHTS, DecoderInfo
from lifecycle.errors import StageError
from lifecycle.graph.cache import QuantizedCache
from lifecycle.graph.fold import Smoothing
from lifecycle.graph.nodes import save_model
from lifecycle.graph.rewrite import GraphRewrite, Linear, Mixture
from lifecycle.graph.weights import WeightFile
from lifecycle.pipeline.suggest import did_you_mean

EMBEDDING = "embed_tokens"
_ROUTERS = "*.router"
"""Small, and a rounded router picks other experts: in float32 unless an exception names them."""


class Scheme(Protocol):
    """A way to store weights, and the nodes that compute with them."""

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace a product."""
        ...

    def experts(self, rewrite: GraphRewrite, mixture: Mixture) -> None:
        """Replace a mixture of experts."""
        ...

    def embedding(self, rewrite: GraphRewrite, head: Linear | None) -> None:
        """Replace the look-up of tokens, and the output head if it is the same matrix."""
        ...


@dataclass(frozen=True, slots=True)
class Quantized:
    """What a quantisation came to."""

    bytes: int
    """Size of the weights."""
    bits_per_weight: float
    """Over all quantised matrices, scales included; 32 if there are none."""


def quantize_graph(
    source: Path,
    out: Path,
    name: str,
    scheme: Scheme | None,
    exceptions: Mapping[str, Scheme | None] | None = None,
    on_done: Callable[[int, int], None] | None = None,
    *,
    cache: QuantizedCache | None = None,
    smoothing: Smoothing | None = None,
) -> Quantized:
    """Write the graph of `source` to `out`, its matrices stored by `scheme`, or as they are for None,
    and its keys and values as `cache` says; `smoothing` changes weights before.

    `exceptions` maps patterns of the names of matrices (`lm_head`, `embed_tokens`,
    `layers.0.mlp.down_proj`, `*.o_proj`, `*.experts`) to other schemes, or to None for float32; the first
    match counts. Memory stays at about one quantised matrix. `on_done(matrices, all)` follows
    the work. `name` is what `decoder.json` calls it.

    Raises:
        StageError: `source` is quantised already, or a pattern matches nothing.
    """
    info = DecoderInfo.load(source)
    if info.scheme != "fp32" or info.kv_dtype != "float32":
        made = info.scheme if info.scheme != "fp32" else f"{info.kv_dtype} cache"
        raise StageError(f"{source} is quantised already ({made}); start from the export")
    with WeightFile(out / WEIGHTS) as weights:
        rewrite = GraphRewrite(source, weights)
        if cache is not None:
            cache.apply(rewrite)
        if smoothing is not None:
            smoothing.apply(rewrite)
        _replace_all(rewrite, scheme, exceptions or {}, on_done or (lambda done, total: None))
        graph = rewrite.finish()
    save_model(graph, out / GRAPH)
    replace(info, scheme=name, kv_dtype=cache.kv_dtype if cache else info.kv_dtype).save(out)
    elements = rewrite.quantized_elements
    bits = 8 * rewrite.quantized_bytes / elements if elements else 32
    return Quantized((out / WEIGHTS).stat().st_size, round(bits, 3))


def _replace_all(
    rewrite: GraphRewrite,
    scheme: Scheme | None,
    exceptions: Mapping[str, Scheme | None],
    on_done: Callable[[int, int], None],
) -> None:
    linears, mixtures = rewrite.linears(), rewrite.mixtures()
    names = [EMBEDDING, *(linear.name for linear in linears), *(m.name for m in mixtures)]
    chosen = _choose(names, scheme, exceptions)
    table = rewrite.embedding().inputs[0]
    tied = next((linear for linear in linears if linear.weight is table), None)
    done, total = 0, len(names)
    for linear in linears:
        picked = chosen[linear.name]
        if linear is not tied and picked is not None:
            picked.linear(rewrite, linear)
        on_done(done := done + 1, total)
    for mixture in mixtures:
        if (picked := chosen[mixture.name]) is not None:
            picked.experts(rewrite, mixture)
        on_done(done := done + 1, total)
    # A matrix that is both head and embedding has one form: an exception for either is for both.
    picked = chosen[EMBEDDING]
    if tied is not None and picked is scheme:
        picked = chosen[tied.name]
    if picked is not None:
        picked.embedding(rewrite, tied)
    on_done(total, total)


def _choose(
    names: Sequence[str], scheme: Scheme | None, exceptions: Mapping[str, Scheme | None]
) -> dict[str, Scheme | None]:
    """The scheme of each matrix."""
    for pattern in exceptions:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise StageError(
                f"no matrix is called '{pattern}'{did_you_mean(pattern, names)} "
                f"(there are {', '.join(names[:5])}, …, {names[-1]})"
            )
    exceptions = {**exceptions, _ROUTERS: None}
    return {
        name: next((s for p, s in exceptions.items() if fnmatchcase(name, p)), scheme)
        for name in names
    }
