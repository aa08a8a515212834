"""From a float32 graph folder to a quantised one, product by product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import onnx_ir as ir

from lifecycle.engines.decoder import FILE, GRAPH, WEIGHTS, DecoderInfo
from lifecycle.errors import StageError
from lifecycle.graph.adapters import save_graphs
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.rewrite import Convolution, GraphRewrite, Linear, Mixture, matrix_shape
from lifecycle.graph.weights import WeightFile
from lifecycle.pipeline.suggest import did_you_mean

if TYPE_CHECKING:
    # They import onnx and ONNX Runtime, which storing weights does without.
    from lifecycle.graph.cache import QuantizedCache

EMBEDDING = "embed_tokens"
_ROUTERS = "*.router"
"""Small, and a rounded router picks other experts: in float32 unless an exception names them."""
_TABLE = 1 << 16
"""Elements from which a table of any graph is worth quantising."""
_QUANTIZED = frozenset(
    {
        *("DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"),
        *("GatherBlockQuantized", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"),
        *("QLinearConv", "QLinearMatMul", "QMoE", "QuantizeLinear"),
    }
)
"""Operators of graphs that are quantised already."""


class Scheme(Protocol):
    """A way to store weights, and the nodes that compute with them."""

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace a product."""
        ...

    def experts(self, rewrite: GraphRewrite, mixture: Mixture) -> None:
        """Replace a mixture of experts."""
        ...

    def embedding(self, rewrite: GraphRewrite, node: ir.Node, head: Linear | None) -> None:
        """Replace a Gather from a table, and the output head if it is the same matrix."""
        ...


class Changes(Protocol):
    """What is done to the weights of a graph before they are stored."""

    def apply(self, rewrite: GraphRewrite) -> None:
        """Do it."""
        ...


@runtime_checkable
class ConvolutionScheme(Scheme, Protocol):
    """A scheme that knows convolutions too; others leave them in float32."""

    def convolution(self, rewrite: GraphRewrite, conv: Convolution) -> None:
        """Replace what a convolution reads and gives."""
        ...

    def finish(self, rewrite: GraphRewrite) -> None:
        """What is to be done when all matrices are replaced."""
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
    changes: Changes | None = None,
) -> Quantized:
    """Write the graph of `source`, a decoder's or any other, to `out`, its matrices stored by
    `scheme`, or as they are for None, and a decoder's keys and values as `cache` says; `changes` are
    made before.

    `exceptions` maps patterns of the names of matrices (`lm_head`, `embed_tokens`,
    `layers.0.mlp.down_proj`, `*.o_proj`, `*.experts`) to other schemes, or to None for float32; the first
    match counts. Memory stays at about one quantised matrix. `on_done(matrices, all)` follows
    the work. `name` is what `decoder.json` calls it.

    Raises:
        StageError: `source` is quantised already, or a pattern matches nothing.
    """
    info = DecoderInfo.load(source) if (source / FILE).is_file() else None
    with WeightFile(out / WEIGHTS) as weights:
        rewrite = GraphRewrite(source, weights)
        _require_float(source, info, rewrite.graph)
        if cache is not None:
            cache.apply(rewrite)
        if changes is not None:
            changes.apply(rewrite)
        _replace_all(
            rewrite, _lookups(rewrite, info), scheme, exceptions or {}, on_done or (lambda *_: None)
        )
        graph = rewrite.finish()
    save_graphs(graph, out, rewrite.ir_version)
    if info is not None:
        kv_dtype = cache.kv_dtype if cache else info.kv_dtype
        schemes = (scheme, *(exceptions or {}).values())
        bits = [each.weight_bits for each in schemes if isinstance(each, Int8Rowwise)]
        info = replace(info, scheme=name, kv_dtype=kv_dtype, weight_bits=max(bits, default=None))
        info.save(out)
    elements = rewrite.quantized_elements
    bits = 8 * rewrite.quantized_bytes / elements if elements else 32
    return Quantized((out / WEIGHTS).stat().st_size, round(bits, 3))


def _require_float(source: Path, info: DecoderInfo | None, graph: ir.Graph) -> None:
    found = next((node.op_type for node in graph if node.op_type in _QUANTIZED), None)
    if info is not None and info.scheme != "fp32":
        found = info.scheme
    elif info is not None and info.kv_dtype != "float32":
        found = f"{info.kv_dtype} cache"
    elif info is not None and info.prefill_scheme is not None:
        found = f"{info.prefill_scheme} for prompts"
    if found is not None:
        start = "the export" if info is not None else "the float32 model"
        raise StageError(f"{source} is quantised already ({found}); start from {start}")


def _lookups(rewrite: GraphRewrite, info: DecoderInfo | None) -> list[ir.Node]:
    """The tables worth quantising: a decoder's tokens, not its positions; others by size."""
    found = rewrite.lookups()
    if info is not None:
        return [node for node in found if node.name == EMBEDDING]
    return [
        node for node in found if (table := node.inputs[0]) and prod(matrix_shape(table)) >= _TABLE
    ]


def _replace_all(
    rewrite: GraphRewrite,
    lookups: Sequence[ir.Node],
    scheme: Scheme | None,
    exceptions: Mapping[str, Scheme | None],
    on_done: Callable[[int, int], None],
) -> None:
    linears, mixtures = rewrite.linears(), rewrite.mixtures()
    convolutions = rewrite.convolutions() if isinstance(scheme, ConvolutionScheme) else []
    named = [*lookups, *linears, *mixtures, *convolutions]
    names = [str(matrix.name) for matrix in named]
    if not names:
        raise StageError(
            f"{rewrite.folder / GRAPH} has no matrix to quantise: no constant float32 weights of a "
            "MatMul, Gemm or Gather"
        )
    chosen = choose(names, scheme, exceptions)
    heads = {
        node: next((linear for linear in linears if linear.weight is node.inputs[0]), None)
        for node in lookups
    }
    done, total = 0, len(names)
    for conv in convolutions:
        picked = chosen[conv.name]
        if isinstance(picked, ConvolutionScheme):
            picked.convolution(rewrite, conv)
        on_done(done := done + 1, total)
    for matrix in _in_order(rewrite, linears, mixtures):
        picked = chosen[matrix.name]
        if matrix not in heads.values() and picked is not None:
            if isinstance(matrix, Mixture):
                picked.experts(rewrite, matrix)
            else:
                picked.linear(rewrite, matrix)
        on_done(done := done + 1, total)
    for node, head in heads.items():
        picked = chosen[str(node.name)] if head is None else tied(chosen, scheme, head.name)
        if picked is not None:
            picked.embedding(rewrite, node, head)
        on_done(done := done + 1, total)
    if isinstance(scheme, ConvolutionScheme):
        scheme.finish(rewrite)


def _in_order(
    rewrite: GraphRewrite, linears: Sequence[Linear], mixtures: Sequence[Mixture]
) -> list[Linear | Mixture]:
    """As they stand in the graph: what walks through layers walks once."""
    by_node = {matrix.node: matrix for matrix in (*linears, *mixtures)}
    return [by_node[node] for node in rewrite.graph if node in by_node]


def tied(chosen: Mapping[str, Scheme | None], scheme: Scheme | None, head: str) -> Scheme | None:
    """The scheme of a matrix that is both head and embedding: an exception for either is for both."""
    embedding = chosen[EMBEDDING]
    return chosen[head] if embedding is scheme else embedding


def decoder_names(rewrite: GraphRewrite) -> list[str]:
    """All matrices of a decoder that a scheme can be chosen for."""
    return [EMBEDDING, *(node.name for node in [*rewrite.linears(), *rewrite.mixtures()])]


def choose(
    names: Sequence[str], scheme: Scheme | None, exceptions: Mapping[str, Scheme | None]
) -> dict[str, Scheme | None]:
    """The scheme of each matrix.

    Raises:
        StageError: a pattern of `exceptions` matches nothing.
    """
    for pattern in exceptions:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise StageError(
                f"the scheme stores no matrix called '{pattern}'{did_you_mean(pattern, names)} "
                f"(there are {', '.join([*names[:5], '…', names[-1]] if len(names) > 6 else names)})"
            )
    exceptions = {**exceptions, _ROUTERS: None}
    return {
        name: next((s for p, s in exceptions.items() if fnmatchcase(name, p)), scheme)
        for name in names
    }
