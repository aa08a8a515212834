"""The ONNX Runtime engine: runs an exported decoder with neither torch nor transformers."""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.decoder import GRAPH, DecoderInfo
from lifecycle.engines.layout import MIN_WIDTH, Inputs, advance, pack
from lifecycle.engines.limits import context_length
from lifecycle.engines.ort_session import (
    CACHE_TYPES,
    cache_names,
    check_signature,
    open_session,
    present_name,
)
from lifecycle.errors import EngineError


class OnnxEngine(BatchedEngine):
    """Continuous batching over an exported decoder, on the providers that it was made for."""

    @classmethod
    def open(
        cls,
        path: Path,
        options: EngineOptions | None = None,
        providers: Sequence[str] | None = None,
    ) -> Self:
        """As `Engine.open`; `providers` are execution providers to run on instead of those that
        the graph was made for."""
        options = options or EngineOptions()
        info = DecoderInfo.load(path)
        max_model_len = context_length(options, info.max_position_embeddings)
        session = open_session(path / GRAPH, providers or info.providers, options.threads)
        check_signature(session, info, path / GRAPH)
        backend = OrtBackend(session, info, options, max_model_len)
        return cls(
            backend,
            options=options,
            vocab_size=info.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=frozenset(info.eos_token_ids),
            long_context=info.long_context,
        )


class OrtBackend:
    """A decoder graph with its cache; keys and values are updated in place.

    Slot b is row b of every cache tensor. A step computes rows 0 to the highest slot in use,
    which is a view of the cache, not a copy.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        info: DecoderInfo,
        options: EngineOptions,
        max_model_len: int,
    ) -> None:
        self._session = session
        self._max_model_len = max_model_len
        self._vocab_size = info.vocab_size
        self._long_offset = info.max_position_embeddings if info.long_context else 0
        self._step_inputs = {i.name for i in session.get_inputs()} - set(cache_names(info))
        num_slots = options.max_num_seqs
        # The attention wants room for the whole width of a step behind every text, also behind
        # those that bring fewer tokens to it.
        capacity = max_model_len + max(options.prefill_chunk, MIN_WIDTH)
        shape = (num_slots, info.num_kv_heads, capacity, info.cache_width)
        dtype = CACHE_TYPES[info.kv_dtype]
        try:
            self._cache = {name: _lazy_zeros(shape, dtype) for name in cache_names(info)}
        except (OSError, OverflowError) as error:
            size = dtype.itemsize * math.prod(shape) * len(cache_names(info))
            raise EngineError(
                f"no memory for a cache of {size >> 20} MiB ({error}): lower max_num_seqs, "
                f"{num_slots}, max_model_len, {max_model_len}, or prefill_chunk, "
                f"{options.prefill_chunk}"
            ) from error
        self._bindings: dict[int, _Binding] = {}
        self._inputs: Inputs = {}
        self._decoding: list[int] = []
        """The slots, if every row of the last step had one token."""

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        decodes = all(len(row.tokens) == row.num_logits == 1 for row in rows)
        slots = [row.slot for row in rows] if decodes else []
        if decodes and slots == self._decoding:
            advance(self._inputs, rows, self._long_offset)
            binding = self._binding(len(self._inputs["query_seqlens"]))
        else:
            self._inputs = pack(rows, self._max_model_len, self._long_offset)
            binding = self._binding(len(self._inputs["query_seqlens"]))
            for name in self._step_inputs:
                binding.binding.bind_cpu_input(name, self._inputs[name])
        self._decoding = slots
        logits = binding.fetch(len(self._inputs["logit_index"]))
        try:
            self._session.run_with_iobinding(binding.binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed: {error}") from error
        return logits

    def close(self) -> None:
        self._bindings.clear()
        self._cache.clear()
        del self._session

    def _binding(self, num_rows: int) -> _Binding:
        """What a step of `num_rows` rows is bound to."""
        if num_rows not in self._bindings:
            cache = {name: array[:num_rows] for name, array in self._cache.items()}
            self._bindings[num_rows] = _Binding(self._session, cache, self._vocab_size)
        return self._bindings[num_rows]


class _Binding:
    """The cache and the logits of steps over so many slots, bound once."""

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: dict[str, NDArray[Any]],
        vocab_size: int,
    ) -> None:
        self.binding = ort.IOBinding(session)
        for name, array in cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(present_name(name), value)
        self._logits = np.empty((0, vocab_size), np.float32)
        self._bound_rows = -1

    def fetch(self, count: int) -> NDArray[np.float32]:
        """Where the next run writes `count` rows of logits."""
        if count > len(self._logits):
            self._logits = np.empty((count, self._logits.shape[1]), np.float32)
        logits = self._logits[:count]
        if count != self._bound_rows:
            self._bound_rows = count
            address = logits.ctypes.data
            self.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, address)
        return logits


def _lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that take memory page by page as they are written, so that a slot costs what its texts
    have filled and not its capacity. `numpy.zeros` asks for huge pages, one of which spans several
    heads: the first tokens of a text then took the memory of its whole slot."""
    # Private, or a fork of the process would write into the same cache.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape), flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
