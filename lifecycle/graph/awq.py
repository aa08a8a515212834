"""AWQ (arXiv 2306.00978): channels that carry large activations are scaled up in the weights that read
them, so that rounding hurts them less, and down in what makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.decoder import GRAPH, WEIGHTS, DecoderInfo
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.channels import Channels, scalable_channels
from lifecycle.graph.nodes import save_model
from lifecycle.graph.quantize import Scheme, choose, decoder_names
from lifecycle.graph.rewrite import GraphRewrite
from lifecycle.graph.rounding import Floats, quantize
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
            if names:
                sizes = np.diag(calibration.second_moments(names[0]))
                _scale(rewrite, channels, _best_scales(rewrite, channels, names, sizes, scheme))
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
    mean = np.bincount(copies, squares) / np.bincount(copies)
    sizes = np.sqrt(np.maximum(mean, _SMALLEST**2 * mean.max() or 1)).astype(np.float32)
    tried = [sizes**power for power in _POWERS]
    tried = [scales / np.sqrt(scales.max() * scales.min()) for scales in tried]

    def errors(rows: Floats) -> NDArray[np.float64]:
        found: list[NDArray[np.float64]] = []
        for scales in tried:
            wide = scales[copies]
            rounded = quantize(rows * wide, scheme.grid, scheme.fit).floats(len(wide)) / wide
            found.append((np.square(rounded - rows) * squares).sum(axis=1, dtype=np.float64))
        return np.array(found)

    total = np.zeros(len(tried))
    for reader in channels.readers:
        if reader.name in names:
            # Of each row first: how many come together depends on the cores, and the sum must not.
            parts = list(rewrite.map_blocks(reader.weight, errors))
            total += np.concatenate(parts, axis=1).sum(axis=1)
    return tried[int(total.argmin())]


def _scale(rewrite: GraphRewrite, channels: Channels, scales: Floats) -> None:
    source = channels.source
    for reader in channels.readers:
        rewrite.scale(reader.weight, columns=scales[source.copies])
    for constant in source.constants:
        assert constant.shape is not None
        rows = np.ones(constant.shape.numpy()[0], np.float32)
        rows[source.start : source.start + len(scales)] /= scales
        rewrite.scale(constant, rows=rows)
