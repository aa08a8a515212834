"""Whether an exported graph computes what PyTorch computes, however a text is fed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.errors import StageError

Logits = NDArray[np.float32]

_LENGTHS = (90, 37, 64)
"""Tokens of the texts, as far as the model can read them."""
_CHUNK = 16


def measure_parity(model: Path, graph: Path) -> dict[str, float]:
    """How far the logits of an ONNX folder are from those of the Hugging Face folder it was made
    of, by the way of feeding: at once (`prefill`), in `chunks`, `ragged` among others at other
    speeds, and with a `rollback` on the way. Each is the largest difference as a part of the
    largest logit, or of 1 if that is larger. The texts are random tokens, the same each time.

    Raises:
        StageError: the logits are no numbers.
    """
    from lifecycle.engines.ort import OnnxEngine
    from lifecycle.engines.pytorch import TorchEngine

    info = DecoderInfo.load(graph)
    room = min(info.max_position_embeddings, max(_LENGTHS))
    random = np.random.default_rng(0)
    texts = [random.integers(0, info.vocab_size, min(n, room)).tolist() for n in _LENGTHS]
    whole = EngineOptions(1, room, prefill_chunk=max(_LENGTHS))
    reference = TorchEngine.open(model, whole)
    wanted = [reference.logits(text) for text in texts]
    # Both would be in memory otherwise.
    reference.close()
    options = EngineOptions(len(texts) + 1, room, max(_LENGTHS))
    providers = ["CPUExecutionProvider"] if missing_providers(graph) else info.providers
    engine = OnnxEngine.open(graph, options, providers)
    try:
        ways: dict[str, Callable[[BatchedEngine, Sequence[list[int]]], list[Logits]]] = {
            "prefill": lambda e, t: [e.logits(text) for text in t],
            "chunks": _in_chunks,
            "ragged": _ragged,
            "rollback": _rolled_back,
        }
        return {name: _distance(feed(engine, texts), wanted) for name, feed in ways.items()}
    finally:
        engine.close()


def missing_providers(graph: Path) -> list[str]:
    """The execution providers of an ONNX folder that this installation does not have; its graph
    is then compared on the CPU."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name in DecoderInfo.load(graph).providers if name not in available]


def _distance(found: Sequence[Logits], wanted: Sequence[Logits]) -> float:
    pairs = list(zip(found, wanted, strict=True))
    if not all(np.isfinite(one).all() and np.isfinite(other).all() for one, other in pairs):
        raise StageError("the model's logits are no finite numbers; its weights are damaged")
    scale = max(1.0, *(float(np.abs(logits).max()) for logits in wanted))
    return max(float(np.abs(one - other).max()) for one, other in pairs) / scale


def _feed(engine: BatchedEngine, text: Sequence[int], start: int, stop: int, slot: int) -> Row:
    tokens = text[start:stop]
    return Row(slot, start, tokens, len(tokens), engine.is_long(text))


def _in_chunks(engine: BatchedEngine, texts: Sequence[list[int]]) -> list[Logits]:
    return [_alone(engine, text, 0) for text in texts]


def _alone(engine: BatchedEngine, text: list[int], start: int) -> Logits:
    """The rest of a text from `start`, chunk by chunk."""
    parts = [
        engine.forward([_feed(engine, text, at, at + _CHUNK, 0)]).copy()
        for at in range(start, len(text), _CHUNK)
    ]
    return np.concatenate(parts)


def _ragged(engine: BatchedEngine, texts: Sequence[list[int]]) -> list[Logits]:
    """All at once, each at its own speed, from the last slot to the second."""
    speeds, done = (_CHUNK, 1, 5), [0] * len(texts)
    slots = [len(texts) - i for i in range(len(texts))]
    parts: list[list[Logits]] = [[] for _ in texts]
    while running := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        rows = [_feed(engine, texts[i], done[i], done[i] + speeds[i], slots[i]) for i in running]
        logits = engine.forward(rows)
        at = 0
        for i, row in zip(running, rows, strict=True):
            parts[i].append(logits[at : at + row.num_logits].copy())
            at += row.num_logits
            done[i] += len(row.tokens)
    return [np.concatenate(part) for part in parts]


def _rolled_back(engine: BatchedEngine, texts: Sequence[list[int]]) -> list[Logits]:
    """After half of a text comes the half of another, which is taken back."""
    found: list[Logits] = []
    for text, other in zip(texts, [*texts[1:], texts[0]], strict=True):
        half = max(1, len(text) // 2)
        first = engine.forward([_feed(engine, text, 0, half, 0)]).copy()
        wrong = text[:half] + other[: len(text) - half]
        engine.forward([_feed(engine, wrong, half, len(wrong), 0)])
        found.append(np.concatenate([first, _alone(engine, text, half)]))
    return found
