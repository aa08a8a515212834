"""AWQ (arXiv 2306.00978): channels that carry large activations are scaled up in the weights that read
them, so that rounding hurts them less, and down in what makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.decoder import GRAPH, WEIGHTS, DecoderInfo
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration, require_finite
from lifecycle.graph.channels import Channels, scalable_channels
from lifecycle.graph.experts import common_grid
from lifecycle.graph.nodes import save_model
from lifecycle.graph.quantize import Scheme, choose, decoder_names
from lifecycle.graph.rewrite import GraphRewrite, Mixture
from lifecycle.graph.rounding import Fit, Floats, Grid, quantize
from lifecycle.graph.routing import Routed, Visits, gated
from lifecycle.graph.weights import WeightFile

_POWERS = np.linspace(0, 1, 20, endpoint=False, dtype=np.float32)
"""Powers of the activations that are tried as scales, as in the paper; 0 scales nothing."""
_SMALLEST = 1e-4
"""Least size of a channel, as a part of the largest: what is never read has no scale."""


def scale_channels(
    source: Path,
    out: Path,
    calibration: Calibration,
    scheme: Blockwise,
    exceptions: Mapping[str, Scheme | None],
    on_done: Callable[[int, int], None] | None = None,
) -> None:
    """Write the float32 graph of `source` to `out` with its channels scaled for `scheme`: it computes
    the same, and loses less when it is rounded.

    `calibration` is a fresh one of `source`. Only the products that `scheme` will round count, by
    `exceptions` as `quantize_graph` takes them. `on_done(layers' parts, all)` follows the work.

    Raises:
        StageError: a pattern matches nothing.
    """
    with WeightFile(out / WEIGHTS) as weights:
        rewrite = GraphRewrite(source, weights)
        chosen = choose(decoder_names(rewrite), scheme, exceptions)
        found = scalable_channels(rewrite)
        for done, channels in enumerate(found, 1):
            names = [reader.name for reader in channels.readers if chosen[reader.name] is scheme]
            mixture = channels.mixture
            if mixture is not None and chosen[mixture.name] is scheme:
                routed = calibration.routed(mixture.name)
                _scale_mixture(rewrite, channels, mixture, routed, scheme)
            elif names:
                squares = np.diag(calibration.second_moments(names[0]))
                _scale(rewrite, channels, _best_scales(rewrite, channels, names, squares, scheme))
            if on_done is not None:
                on_done(done, len(found))
        graph = rewrite.finish()
    save_model(graph, out / GRAPH)
    DecoderInfo.load(source).save(out)


def _best_scales(
    rewrite: GraphRewrite,
    channels: Channels,
    names: list[str],
    squares: Floats,
    scheme: Blockwise,
) -> Floats:
    """The scales of the source's channels that leave the least error in what the products `names` give;
    `squares` are the mean squares of what they read.

    Rounding errors of different columns hardly go together, so that the squares of the inputs are
    all that is needed of their second moments.
    """
    copies = channels.source.copies
    tried = _scales_to_try(np.bincount(copies, squares) / np.bincount(copies))
    wide = [scales[copies] for scales in tried]

    def errors(rows: Floats) -> NDArray[np.float64]:
        return _errors(rows, squares, wide, scheme.grid, scheme.fit)

    total = np.zeros(len(tried))
    for reader in channels.readers:
        if reader.name in names:
            # Of each row first: how many come together depends on the cores, and the sum must not.
            parts = list(rewrite.map_blocks(reader.weight, errors))
            total += np.concatenate(parts, axis=1).sum(axis=1)
    return tried[int(total.argmin())]


def _scales_to_try(squares: NDArray[np.floating]) -> list[Floats]:
    """Scales of channels with such mean squares."""
    least = _SMALLEST**2 * squares.max() or 1
    sizes = np.sqrt(np.maximum(squares, least)).astype(np.float32)
    tried = [sizes**power for power in _POWERS]
    return [scales / np.sqrt(scales.max() * scales.min()) for scales in tried]


def _errors(
    rows: Floats, squares: Floats, tried: Sequence[Floats], grid: Grid, fit: Fit
) -> NDArray[np.float64]:
    """What rounding rows of weights, [rows, in], costs with each of the scales of their columns, [tried, rows]."""
    found: list[NDArray[np.float64]] = []
    for scales in tried:
        rounded = quantize(rows * scales, grid, fit).floats(len(scales)) / scales
        found.append((np.square(rounded - rows) * squares).sum(axis=1, dtype=np.float64))
    return np.array(found)


def _scale(rewrite: GraphRewrite, channels: Channels, scales: Floats) -> None:
    source = channels.source
    for weight in channels.weights:
        rewrite.scale(weight, columns=scales[source.copies])
    for constant in source.constants:
        assert constant.shape is not None
        rows = np.ones(constant.shape.numpy()[0], np.float32)
        rows[source.start : source.start + len(scales)] /= scales
        rewrite.scale(constant, rows=rows)


def _scale_mixture(
    rewrite: GraphRewrite, channels: Channels, mixture: Mixture, routed: Routed, scheme: Blockwise
) -> None:
    """Scale what all experts read by one scale for each channel, and what each makes of it by its own; none of
    these for an expert that no token visits."""
    grid, fit = common_grid(mixture, scheme.grid), scheme.fit

    def squares(expert: int) -> tuple[Floats, Floats]:
        sums = _squares(rewrite.expert(mixture.gate_up, expert), routed.visits(expert))
        require_finite(dict(enumerate(sums)), f"what expert {expert} of {mixture.name} reads")
        return sums

    experts = range(mixture.num_experts)
    found = list(rewrite.at_once(partial(squares, expert) for expert in experts))
    read, made = (np.array(each) for each in zip(*found, strict=True))
    tried = _scales_to_try(read.sum(axis=0))

    def shared(expert: int) -> NDArray[np.float64]:
        rows = rewrite.expert(mixture.gate_up, expert)
        return _errors(rows, read[expert], tried, grid, fit).sum(axis=1)

    def own(expert: int) -> Floats:
        scales = _scales_to_try(made[expert])
        rows = rewrite.expert(mixture.down, expert)
        errors = _errors(rows, made[expert], scales, grid, fit).sum(axis=1)
        return scales[int(errors.argmin())]

    total = np.sum(list(rewrite.at_once(partial(shared, expert) for expert in experts)), axis=0)
    inner = np.array(list(rewrite.at_once(partial(own, expert) for expert in experts)))
    _scale(rewrite, channels, tried[int(total.argmin())])
    gates_and_ups = np.ones((*inner.shape, 2), np.float32)
    gates_and_ups[..., 1] /= inner
    rewrite.scale(mixture.gate_up, rows=gates_and_ups.reshape(-1))
    rewrite.scale(mixture.down, columns=inner)


def _squares(gate_up: Floats, visits: Visits) -> tuple[Floats, Floats]:
    """The sums of squares of what an expert reads, [in], and makes of it, [size], each token by what it counts for
    the output."""
    inner = gated(visits.rows, gate_up)
    read, made = (np.square(rows * visits.shares).sum(axis=0) for rows in (visits.rows, inner))
    return read, made
