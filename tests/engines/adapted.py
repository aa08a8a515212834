"""A small model with slots for adapters, in both forms, and adapters for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.graph.models import save_model

CHECKPOINT, GRAPH = "hf", "onnx"
FORMS = (GRAPH, CHECKPOINT)
"""The folders of the model, each for one of the engines."""
SLOTS = 4
RANK = 6


def make_adapted(root: Path, slots: int, adapters: int) -> None:
    """Both forms in `root`, and so many different adapters in folders "0", "1", …"""
    save_model("llama-tied", root / CHECKPOINT)
    (root / GRAPH).mkdir()
    export_decoder(root / CHECKPOINT, root / GRAPH, Cpu(), slots=(slots, RANK))
    for n in range(adapters):
        write_random_adapter(root / str(n), layout_of(root / GRAPH), seed=n)


def layout_of(graph: Path) -> AdapterLayout:
    layout = AdapterLayout.load(graph)
    assert layout is not None
    return layout


def open_form(folder: Path, options: EngineOptions | None = None) -> BatchedEngine:
    """The engine of a form. How a prompt is cut shows in PyTorch's last bits, so there no pace does it."""
    options = options or EngineOptions()
    if folder.name == CHECKPOINT:
        return TorchEngine.open(folder, replace(options, max_stall=None))
    return OnnxEngine.open(folder, options)
