"""Exported models that measurements have in common."""

from __future__ import annotations

import shutil
from pathlib import Path

from lifecycle.engines import adapters
from lifecycle.engines.native.library import adds_bytes_exactly
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

ROWWISE = Int8Rowwise(8 if adds_bytes_exactly() else 7)
"""The bits that `quantize` takes on this host."""


def in_int8(checkpoint: Path, folder: Path, slots: tuple[int, int] | None = None) -> Path:
    """The checkpoint in row-wise int8, in `folder`, with adapter slots where they are given: their number
    and rank. Its float32 graph lies beside it, in `FOLDER-fp32`."""
    full = folder.with_name(f"{folder.name}-fp32")
    for path in (full, folder):
        path.mkdir(parents=True, exist_ok=True)
    export_decoder(checkpoint, full, Cpu(), slots=slots)
    quantize_graph(full, folder, "int8-rowwise", ROWWISE)
    if slots is not None:
        shutil.copy(full / adapters.FILE, folder)
    return folder
