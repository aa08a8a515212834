"""A model under evaluation: its folder, the engine that runs it, the tokeniser it speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.kinds import HfModel, OnnxGraph, OnnxModel
from lifecycle.pipeline import registry

SLOTS = 16
"""Requests that an evaluation answers together."""
_WEIGHTS = (".onnx", ".onnx.data", ".safetensors")


@dataclass(frozen=True, slots=True)
class Subject:
    """An open model."""

    artifact: HfModel | OnnxModel
    engine: Engine
    tokenizer: ChatTokenizer


def weight_bytes(artifact: HfModel | OnnxGraph) -> int:
    """Bytes of the files with the weights of a model, its graph included."""
    return sum(file.size for file in artifact.files if file.path.endswith(_WEIGHTS))


@contextmanager
def opened(artifact: HfModel | OnnxModel, slots: int = SLOTS) -> Iterator[Subject]:
    """Open a model with the engine of its kind, for `slots` requests at a time; it is closed at
    the end of the `with` block.

    Raises:
        EngineError, CheckpointError: the folder cannot be run.
        MissingExtraError: the engine's packages are not installed.
    """
    use = "onnxruntime" if isinstance(artifact, OnnxModel) else "pytorch"
    engine = registry.load(registry.ENGINES, use, Engine)
    tokenizer = ChatTokenizer.load(artifact.path)
    with closing(engine.open(artifact.path, EngineOptions(max_num_seqs=slots))) as running:
        yield Subject(artifact, running, tokenizer)
