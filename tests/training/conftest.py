"""A tiny model on toy rows, and a progress that stops a run at a chosen step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lifecycle.data.packing import Packed, pack_samples
from lifecycle.errors import InterruptedRun
from lifecycle.training.architecture import new_config, new_model
from lifecycle.training.loop import Loop
from lifecycle.training.settings import LoopSettings
from tests.conftest import QuietProgress

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}
TOKENS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def tiny_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A Llama of some 20,000 random weights, with dropout."""
    return new_model(new_config(TINY | changes, TOKENS), seed)


def toy_rows(samples: int = 40, context_length: int = 32) -> Packed:
    """Samples that count upwards; all tokens but the first third are trained."""
    rng = np.random.default_rng(0)
    packed: list[tuple[list[int], list[bool]]] = []
    for _ in range(samples):
        length = int(rng.integers(4, 14))
        start = int(rng.integers(2, 20))
        trained = [i * 3 >= length for i in range(length)]
        packed.append((list(range(start, start + length)), trained))
    return pack_samples(packed, context_length, pad_id=0)


class StoppingProgress(QuietProgress):
    """Asks to stop once `at` steps are done, as a Ctrl-C would."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.steps = at, 0

    def update(self, done: float, total: float | None = None, **metrics: float) -> None:
        super().update(done, total, **metrics)
        if self.stopping:
            raise InterruptedRun("stopped")
        self.steps = int(done)
        self.stopping = self.at is not None and self.steps + 1 >= self.at


def train(
    scratch: Path,
    settings: LoopSettings,
    progress: QuietProgress | None = None,
    model: PreTrainedModel | None = None,
) -> dict[str, torch.Tensor]:
    """Train a tiny model on toy rows; its weights."""
    scratch.mkdir(exist_ok=True)
    model = model or tiny_model()
    Loop(model, toy_rows(), None, settings, scratch, progress or QuietProgress()).run()
    return model.state_dict()


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The weights are equal bit for bit."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture
def settings() -> LoopSettings:
    """Twelve steps in a few epochs."""
    return LoopSettings(steps=12, batch_size=4, context_length=32, threads=1)
