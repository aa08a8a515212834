"""What it costs a decoder to have its prompts computed by another graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.evaluation.scoring import Agreement, log_softmax


def compare_prompts(
    folder: Path,
    texts: Sequence[Sequence[int]],
    on_done: Callable[[int, int], None] = lambda *_: None,
) -> Agreement:
    """How far the second half of each text is from what it is without `prefill.onnx`, where the first half
    is a prompt. `texts` have 2 tokens at least.

    Returns:
        The model with both graphs, against the one that computes all by `model.onnx`.

    Raises:
        EngineError: the folder cannot be run, or the runtime failed.
    """
    found = Agreement()
    longest = max(map(len, texts))
    with closing(OnnxEngine.open(folder, EngineOptions(1, longest))) as engine:
        for done, text in enumerate(texts, 1):
            half = len(text) // 2
            ours, reference = (
                log_softmax(_second_half(engine, text, num_prompt)) for num_prompt in (half, 0)
            )
            found.add_distributions(ours, reference)
            on_done(done, len(texts))
    return found


def _second_half(
    engine: OnnxEngine, text: Sequence[int], num_prompt: int, chunk: int = 128
) -> NDArray[np.float32]:
    """The logits of the second half, where so many tokens are a prompt."""
    half = len(text) // 2
    parts: list[NDArray[np.float32]] = []
    for begin, end in ((0, half), (half, len(text))):
        for start in range(begin, end, chunk):
            tokens = text[start : min(start + chunk, end)]
            count = len(tokens) if begin else 0
            is_long = engine.is_long(text)
            row = Row(
                0,
                start,
                tokens,
                count,
                is_long,
                num_prompt=min(num_prompt, len(tokens)) * (not begin),
            )
            logits = engine.forward([row])
            if begin:
                parts.append(logits.copy())
    return np.concatenate(parts)
