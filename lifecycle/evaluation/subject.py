"""A model under evaluation: its folder, the engine that runs it, the tokeniser it speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.kinds import HfModel, OnnxModel
from lifecycle.pipeline import registry

_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Subject:
    """An open model."""

    artifact: HfModel | OnnxModel
    engine: Engine
    tokenizer: ChatTokenizer


@contextmanager
def opened(artifact: HfModel | OnnxModel) -> Iterator[Subject]:
    """Open a model with the engine of its kind; it is closed at the end of the `with` block.

    Raises:
        EngineError, CheckpointError: the folder cannot be run.
        MissingExtraError: the engine's packages are not installed.
    """
    use = "onnxruntime" if isinstance(artifact, OnnxModel) else "pytorch"
    engine = registry.load(registry.ENGINES, use, Engine)
    tokenizer = ChatTokenizer.load(artifact.path)
    with closing(engine.open(artifact.path, EngineOptions(max_num_seqs=_SLOTS))) as running:
        yield Subject(artifact, running, tokenizer)
