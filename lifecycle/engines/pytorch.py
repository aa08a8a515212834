"""The PyTorch engine: the reference that the others are compared with.

Every row runs by itself, through the model and the cache of transformers, so nothing that a
batch does can reach its numbers.
"""

# transformers and torch type their own interfaces loosely.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lifecycle.engines.backend import Block, Row
from lifecycle.engines.base import AdapterWeights, EngineOptions, StrPath
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.draft_model import Draft
from lifecycle.engines.draft_pair import check_pair
from lifecycle.engines.limits import context_length
from lifecycle.engines.pytorch_adapters import TorchAdapters
from lifecycle.engines.pytorch_cache import TorchCache
from lifecycle.errors import CheckpointError, EngineError


class TorchEngine(BatchedEngine):
    """A Hugging Face folder, with its adapter if it has one, in float32 on the CPU."""

    @classmethod
    def open(cls, path: StrPath, options: EngineOptions | None = None) -> Self:
        from lifecycle.training.models import load_model

        path, options = Path(path), options or EngineOptions()
        if options.providers is not None:
            raise EngineError(
                "providers are ONNX Runtime's, and PyTorch runs on the CPU: leave them out, or take the engine onnxruntime"
            )
        try:
            model = load_model(path)
        except CheckpointError as error:
            raise EngineError(str(error)) from error
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        config: Any = model.config
        max_model_len = context_length(options, config.max_position_embeddings)
        return cls(
            _backend(model),
            options=options,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=_eos_token_ids(model),
            long_context=_long_context(config),
            draft=_draft(path, config, options, max_model_len),
        )


class TorchBackend:
    """A model of transformers with one cache per slot, and adapters beside it."""

    can_roll_back = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache_argument = _cache_argument(model)
        config: Any = model.config
        self.hidden_size: int = config.hidden_size
        self._make_long_frequencies()
        self._cache = TorchCache(config)
        self._adapters = TorchAdapters(model)

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        return np.concatenate([self._logits(row) for row in rows])

    def hidden_states(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        return np.concatenate([self._hidden(row) for row in rows])

    @property
    def adapter_slots(self) -> int:
        return self._adapters.slots

    def read_adapter(self, folder: Path) -> AdapterWeights:
        return self._adapters.read(folder)

    def load_adapter(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        return self._adapters.load(weights, instead_of)

    def unload_adapter(self, number: int) -> None:
        self._adapters.unload(number)

    def close(self) -> None:
        self._cache.clear()
        del self._model, self._adapters

    def _make_long_frequencies(self) -> None:
        """Let transformers make them now: it does so at the first long position, from a config
        that `_rotated_as_long` has changed by then."""
        beyond = _long_context(self._model.config)
        for module in self._model.modules():
            if beyond and getattr(module, "rope_type", None) == "longrope":
                module(torch.zeros(1), position_ids=torch.tensor([[beyond]]))

    def _logits(self, row: Row) -> NDArray[np.float32]:
        # 0 would mean all of them.
        output = self._run(self._model, row, logits_to_keep=max(row.num_logits, 1))
        return output.logits[0, : row.num_logits].float().numpy()

    def _hidden(self, row: Row) -> NDArray[np.float32]:
        output = self._run(self._model.base_model, row)
        return output.last_hidden_state[0, len(row.tokens) - row.num_logits :].float().numpy()

    @torch.inference_mode()
    def _run(self, module: Any, row: Row, **options: int) -> Any:
        """What a module, the model or its inner one, makes of a row."""
        config = self._model.config
        rotation = _rotated_as_long(config) if row.is_long else nullcontext()
        with _failures(), rotation, self._adapters.applied(row.adapter):
            cache = self._cache.begin(row.slot, row.start)
            return module(
                input_ids=torch.tensor([row.tokens]),
                **{self._cache_argument: cache},
                use_cache=True,
                **options,
            )


class CopyingBackend(TorchBackend):
    """One that can copy its cache, for a model with keys and values of all tokens."""

    can_roll_back = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        # How keys and values lie is known once there are some.
        self.forward([Row(0, 0, [0], 1)])
        self._shapes = self._cache.shapes(0)
        self.bytes_per_token = self._cache.read(0, 0, 1).nbytes
        self.forget(0)

    def read_cache(self, slot: int, start: int, stop: int) -> Block:
        with _failures():
            return self._cache.read(slot, start, stop)

    def write_cache(self, slot: int, start: int, block: Block, count: int | None = None) -> None:
        with _failures():
            self._cache.write(slot, start, block[:count], self._shapes)

    def copy_cache(self, source: int, target: int, stop: int, start: int = 0) -> None:
        with _failures():
            self._cache.copy(source, target, stop, start)

    def forget(self, slot: int, start: int = 0) -> None:
        self._cache.forget(slot, start)

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        """No layer has a window."""


@contextmanager
def _failures() -> Generator[None]:
    """Inside, PyTorch's errors, among them that there is no memory, are the engine's."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"PyTorch failed: {error}") from error


def _backend(model: PreTrainedModel) -> TorchBackend:
    return CopyingBackend(model) if TorchCache(model.config).is_copyable else TorchBackend(model)


def _draft(path: Path, config: Any, options: EngineOptions, max_model_len: int) -> Draft | None:
    """The draft model of a model, where there is to be one."""
    from lifecycle.training.models import load_model

    if options.draft_model is None:
        return None
    folder = Path(options.draft_model)
    try:
        model = load_model(folder)
    except CheckpointError as error:
        raise EngineError(f"draft_model: {error}") from error
    draft: Any = model.config
    check_pair(path, config.vocab_size, folder, draft.vocab_size)
    for name, each in ((path, config), (folder, draft)):
        if not TorchCache(each).is_copyable:
            raise EngineError(
                f"draft_model: {name} has sliding windows or recurrent layers, where PyTorch's cache cannot "
                "take tokens back; leave draft_model out, or export both models and run them in ONNX Runtime"
            )
    most = min(max_model_len, draft.max_position_embeddings)
    return Draft(_backend(model), most, _long_context(draft))


def _cache_argument(model: Any) -> str:
    """What the model calls its cache: `cache` from transformers 5.24 on."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = signature(inner.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _long_context(config: Any) -> int | None:
    """Tokens beyond which a text is rotated by LongRoPE's long factors; None without them."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    is_longer = config.max_position_embeddings > original
    return original if rope.get("rope_type") == "longrope" and is_longer else None


@contextmanager
def _rotated_as_long(config: Any) -> Generator[None]:
    """Inside, every position is rotated by the long factors. transformers decides by the positions
    of one call, which may be but the beginning of a long text."""
    rope, name = config.rope_parameters, "original_max_position_embeddings"
    original = rope[name]
    rope[name] = 0
    try:
        yield
    finally:
        rope[name] = original


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ends of sequence of `generation_config.json`, or of `config.json` without it."""
    ends: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = getattr(model.config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)
