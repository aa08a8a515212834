"""Whether an exported graph computes what PyTorch computes, however a text is fed to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.evaluation.feeding import CHUNK, WAYS, Logits, alone, distance, ragged
from lifecycle.evaluation.random_adapter import write_random_adapter

_LENGTHS = (90, 37, 64)
"""Tokens of the texts, as far as the model can read them."""


def measure_parity(
    model: Path, graph: Path, on_done: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """How far the logits of an ONNX folder are from those of the Hugging Face folder it was made
    of, by the way of feeding: at once (`prefill`), in `chunks`, `ragged` among others at other
    speeds, and with a `rollback` on the way. Each is the largest difference as a part of the
    largest logit, or of 1 if that is larger. The texts are random tokens, the same each time.
    `on_done(finished, total)` comes after PyTorch and after each way.

    Raises:
        StageError: the logits are no numbers.
    """
    texts = _texts(DecoderInfo.load(graph))
    found: dict[str, float] = {}
    on_done = on_done or (lambda finished, total: None)
    wanted = _reference(model, texts)
    engine = _open(graph)
    try:
        ways: dict[str, Callable[[BatchedEngine, Sequence[list[int]]], list[Logits]]] = {
            "prefill": lambda e, t: [e.logits(text) for text in t],
            **WAYS,
        }
        on_done(1, 1 + len(ways))
        for name, feed in ways.items():
            found[name] = distance(feed(engine, texts), wanted)
            on_done(1 + len(found), 1 + len(ways))
        return found
    finally:
        engine.close()


def measure_hidden(model: Path, graph: Path) -> float:
    """The same distance of the hidden states' means, of texts that run together and in chunks. `graph`
    must have hidden states."""
    from lifecycle.engines.pytorch import TorchEngine

    texts = _texts(DecoderInfo.load(graph))
    means: list[Logits] = []
    # One after the other, or both models would be in memory.
    for open_engine in (lambda: TorchEngine.open(model), lambda: _open(graph, CHUNK)):
        engine = open_engine()
        means.append(engine.embed(texts, normalize=False))
        engine.close()
    return distance(means[1:], means[:1])


def measure_adapters(model: Path, graph: Path) -> float:
    """The same distance where the texts of a batch have different random adapters, the last one
    none, at different speeds; and where each is alone, chunk by chunk. The reference is PEFT's.
    `graph` must have slots."""
    layout = AdapterLayout.load(graph)
    assert layout is not None
    texts = _texts(DecoderInfo.load(graph))
    plain = _reference(model, texts)
    engine = _open(graph)
    try:
        return _with_adapters(model, engine, layout, texts, plain)
    finally:
        engine.close()


def _with_adapters(
    model: Path,
    engine: BatchedEngine,
    layout: AdapterLayout,
    texts: Sequence[list[int]],
    plain: Sequence[Logits],
) -> float:
    wanted = list(plain)
    with TemporaryDirectory() as root, warnings.catch_warnings():
        # PEFT has remarks on configurations, such as on the layout of GPT-2's weights.
        warnings.simplefilter("ignore")
        for n in range(min(layout.slots, len(texts) - 1)):
            folder = Path(root, str(n))
            folder.mkdir()
            for file in model.iterdir():
                (folder / file.name).symlink_to(file.absolute())
            write_random_adapter(folder / "adapter", layout, seed=n)
            wanted[n] = _reference(folder, [texts[n]])[0]
            engine.load_adapter(str(n), folder / "adapter")
    slots = [engine.adapter_number(name) for name in engine.adapters]
    slots += [0] * (len(texts) - len(slots))
    pairs = zip(texts, slots, strict=True)
    by_itself = [alone(engine, text, 0, slot) for text, slot in pairs]
    return max(distance(by_itself, wanted), distance(ragged(engine, texts, slots), wanted))


def _texts(info: DecoderInfo) -> list[list[int]]:
    random = np.random.default_rng(0)
    room = min(info.max_position_embeddings, max(_LENGTHS))
    return [random.integers(0, info.vocab_size, min(n, room)).tolist() for n in _LENGTHS]


def _reference(model: Path, texts: Sequence[list[int]]) -> list[Logits]:
    """What PyTorch makes of texts; its model is not kept, or both would be in memory."""
    from lifecycle.engines.pytorch import TorchEngine

    length = max(2, max(map(len, texts)))
    engine = TorchEngine.open(model, EngineOptions(1, length, prefill_chunk=length))
    try:
        return [engine.logits(text) for text in texts]
    finally:
        engine.close()


def _open(graph: Path, chunk: int = max(_LENGTHS)) -> BatchedEngine:
    from lifecycle.engines.ort import OnnxEngine

    info = DecoderInfo.load(graph)
    room = min(info.max_position_embeddings, max(_LENGTHS))
    providers = ["cpu"] if missing_providers(graph) else None
    options = EngineOptions(len(_LENGTHS) + 1, room, prefill_chunk=chunk, providers=providers)
    return OnnxEngine.open(graph, options)


def missing_providers(graph: Path) -> list[str]:
    """The execution providers of an ONNX folder that this installation does not have; its graph
    is then compared on the CPU."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name in DecoderInfo.load(graph).providers if name not in available]
