"""The ONNX Runtime engine: runs an exported decoder with neither torch nor transformers."""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort

from lifecycle.engines import tensor_cache
from lifecycle.engines.adapters import GRAPH as ADAPTED
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions, StrPath
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.decoder import (
    GRAPH,
    HIDDEN_GRAPH,
    HIDDEN_STATES,
    PREFILL_GRAPH,
    WEIGHTS,
    DecoderInfo,
)
from lifecycle.engines.device_cache import Device, DeviceCache, cache_device
from lifecycle.engines.draft_model import Draft
from lifecycle.engines.draft_pair import check_pair
from lifecycle.engines.limits import context_length
from lifecycle.engines.native.library import adds_bytes_exactly, kernels_for
from lifecycle.engines.native.sampling import native_passes
from lifecycle.engines.native.swap import attends, computes_by_token, swap
from lifecycle.engines.onnx_file import check_external_data
from lifecycle.engines.ort_backend import CopyingOrtBackend, OrtBackend
from lifecycle.engines.ort_session import (
    CACHE_PARTS,
    CACHE_TYPES,
    cache_names,
    check_signature,
    known_providers,
    open_session,
    present_name,
)
from lifecycle.engines.packed_weights import PROVIDERS
from lifecycle.engines.providers import provider_names
from lifecycle.engines.sampling import NUMPY
from lifecycle.engines.slot_cache import SlotCache
from lifecycle.engines.state import LONGEST_RUN
from lifecycle.engines.tensor_cache import TensorCache
from lifecycle.engines.windows import Windows
from lifecycle.errors import EngineError

_log = logging.getLogger(__name__)
_SMALL_DRAFT = 32 << 20
"""Bytes of a draft model's weights up to which it runs on one thread: on more it is little faster, and its threads, which
wait for work by spinning, take turns with those of the model on the same cores."""
_MOST_SCORES = 128 << 20
"""Bytes of attention scores, below which all of a layer are held at once: that is up to 1.3 times as fast, since
attention in blocks makes many small products, but what was touched of them stays in memory."""

_NOISE = 0.05
"""Of the largest logit: what comes of rounding, with products in half as many bits too, is far less."""


class OnnxEngine(BatchedEngine):
    """Continuous batching over an exported decoder, on the providers that it was made for."""

    @classmethod
    def open(cls, path: StrPath, options: EngineOptions | None = None) -> Self:
        path, options = Path(path), options or EngineOptions()
        if options.providers is not None:
            options = replace(options, providers=known_providers(options.providers))
        info = DecoderInfo.load(path)
        max_model_len = context_length(options, info.max_position_embeddings)
        kernels = _kernels(options, info)
        layout = AdapterLayout.load(path)
        _warn_of_sums(path, info, kernels)
        backend = _backend(path, info, options, max_model_len, kernels, layout)
        engine = cls(
            backend,
            options=options,
            vocab_size=info.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=frozenset(info.eos_token_ids),
            long_context=info.long_context,
            windows=Windows(info.windows),
            has_prompt_graph=info.prefill_scheme is not None,
            # Only the prefix cache asks.
            cuts_freely=options.prefix_cache_bytes > 0
            and _holds(path, _text_graphs(info, layout), kernels, computes_by_token),
            draft=_draft(path, info, options, max_model_len),
            passes=NUMPY if kernels is None else native_passes(kernels, backend.columns_of),
        )
        engine.kernels = "onnxruntime" if kernels is None else "native"
        engine.providers = backend.providers
        return engine


def _backend(
    path: Path,
    info: DecoderInfo,
    options: EngineOptions,
    max_model_len: int,
    kernels: Path | None,
    layout: AdapterLayout | None = None,
) -> OrtBackend:
    def open_graph(name: str, slots: AdapterLayout | None) -> ort.InferenceSession:
        output = (HIDDEN_STATES, info.hidden_size) if name == HIDDEN_GRAPH else None
        if output and not (path / name).is_file():
            raise EngineError(
                f"{path} gives no hidden states: export the model with hidden_states: true"
            )
        session = open_session(
            path / name,
            options.providers or info.providers,
            options.threads,
            options.packed_weights,
            whole_scores=_whole_scores(info, options, max_model_len),
            kernels=kernels,
            shared=names if is_shared else (),
        )
        check_signature(session, info, path / name, slots, output, is_native=kernels is not None)
        return session

    names = cache_names(info)
    cache_parts = [(name, present_name(name)) for name in names]
    graphs = [
        *_text_graphs(info, layout),
        *([HIDDEN_GRAPH] if (path / HIDDEN_GRAPH).is_file() else []),
    ]
    is_shared = _holds(path, graphs, kernels, lambda graph: attends(swap(graph), cache_parts))

    def open_beside(name: str, slots: AdapterLayout | None) -> ort.InferenceSession:
        found = open_graph(name, slots)
        if cache_device(found, names) != device:
            raise EngineError(
                f"{path / name} reads its cache elsewhere than {GRAPH}: run attention of both on the CPU"
            )
        return found

    session = open_graph(GRAPH, None)
    # The attention wants room for the whole width of a step behind every text, also behind
    # those that bring fewer tokens to it.
    capacity = max_model_len + max(options.prefill_chunk, LONGEST_RUN) + options.draft_tokens
    shape = options.max_num_seqs, info.num_kv_heads, capacity, info.cache_width
    dtype = CACHE_TYPES[info.kv_dtype]
    device = cache_device(session, names)
    arguments = info, max_model_len, layout
    if device is not None and not tensor_cache.reaches(device):
        cache = DeviceCache(device, names, shape, dtype)
        backend = OrtBackend(open_beside, session, cache, *arguments)
    elif device is not None:
        _check_whole(path, options, device, len(names) * math.prod(shape) * dtype.itemsize)
        cache = TensorCache(device, names, shape, dtype)
        backend = CopyingOrtBackend(open_beside, session, cache, *arguments)
    else:
        windows = [window for window in info.windows for _ in CACHE_PARTS]
        cache = SlotCache(names, shape, dtype, windows, shared=len(CACHE_PARTS) if is_shared else 1)
        return CopyingOrtBackend(open_beside, session, cache, *arguments)
    try:
        _check_attention(backend, device, options.max_num_seqs)
    except EngineError:
        backend.close()
        raise
    return backend


def _check_whole(path: Path, options: EngineOptions, device: Device, num_bytes: int) -> None:
    """What is taken at once cannot be bounded to a part of itself."""
    budget = options.kv_cache_bytes
    if budget is not None and budget < num_bytes:
        raise EngineError(
            f"kv_cache_bytes is {budget}; on {device[0]} the cache of {path} takes room for every slot's whole context at "
            f"once, {num_bytes}: allow that, or lower max_num_seqs, max_model_len or prefill_chunk"
        )


def _check_attention(backend: OrtBackend, device: Device, num_slots: int) -> None:
    """Attention of a device may not know `query_seqlens`. It fails then, or what it makes of a row depends on how wide
    the step is, and nothing else would tell but answers."""
    tokens = [0, 1, 0, 1]
    rows = [Row(0, 0, tokens, len(tokens)), Row(1, 0, tokens[:1], 1)][:num_slots]
    try:
        whole = backend.forward(rows).copy()
        parts = [backend.forward([Row(0, n, [t], 1)])[0].copy() for n, t in enumerate(tokens)]
    except EngineError as error:
        reason = str(error)
    else:
        apart = np.stack([*parts, parts[0]])[: len(whole)]
        if not np.isfinite(whole).all():
            reason = "its logits are not finite numbers"
        elif np.abs(whole - apart).max() <= _NOISE * np.abs(whole).max():
            return
        else:
            reason = "a text gives other logits token by token"
    raise EngineError(
        f"attention on {device[0]} takes no rows of different lengths ({reason}): run it on the CPU"
    )


def _text_graphs(info: DecoderInfo, layout: AdapterLayout | None) -> list[str]:
    """Those by which requests are computed."""
    prefill = [PREFILL_GRAPH] if info.prefill_scheme is not None else []
    return [GRAPH, *prefill, *([ADAPTED] if layout is not None else [])]


def _holds(
    path: Path, graphs: Sequence[str], kernels: Path | None, question: Callable[[bytes], bool]
) -> bool:
    """Whether something holds of some graphs of a folder, and they are computed by our kernels."""
    if kernels is None:
        return False
    try:
        for graph in graphs:
            check_external_data(path / graph)
            if not question((path / graph).read_bytes()):
                return False
        return True
    except (EngineError, ValueError, IndexError, KeyError, OSError):
        # Whoever opens the graph says what is wrong with it.
        return False


def _kernels(options: EngineOptions, info: DecoderInfo) -> Path | None:
    """The library of our kernels, where they are to compute the graphs."""
    wanted, providers = options.kernels, options.providers or info.providers
    conflict = None
    if provider_names(providers) != PROVIDERS:
        conflict = f"the graph runs on {', '.join(provider_names(providers))}"
    elif tuple(providers) != PROVIDERS:
        conflict = "the provider has options, which only ONNX Runtime's kernels follow"
    elif options.packed_weights is not None:
        conflict = "packed weights are kept as ONNX Runtime's kernels want them"
    if conflict is None:
        return kernels_for(wanted)
    if wanted == "native":
        raise EngineError(f"native kernels cannot be used: {conflict}; leave kernels at auto")
    return None


def _warn_of_sums(path: Path, info: DecoderInfo, kernels: Path | None) -> None:
    """Say it where products may overflow, which nothing else tells but answers."""
    is_ours = kernels is not None and info.scheme != "int8-static"
    if info.weight_bits == 8 and not is_ours and not adds_bytes_exactly():
        _log.warning(
            "%s has weights of 8 bits, whose sums can overflow on this processor, which has no VNNI instructions: "
            "quantize the model with weight_bits: 7",
            path,
        )


def _whole_scores(info: DecoderInfo, options: EngineOptions, max_model_len: int) -> bool:
    """Whether attention holds all scores of a layer at once: for each slot, head, and token of the widest step, as
    many as a slot has room for."""
    if info.num_heads is None:
        return False
    # Guesses take a little more, but must not be what decides: the two ways differ in last bits.
    width = max(options.prefill_chunk, LONGEST_RUN)
    scores = options.max_num_seqs * info.num_heads * width * (max_model_len + width)
    return 4 * scores <= _MOST_SCORES


def _draft(
    path: Path, info: DecoderInfo, options: EngineOptions, max_model_len: int
) -> Draft | None:
    """The draft model of a model, where there is to be one."""
    if options.draft_model is None:
        return None
    folder = Path(options.draft_model)
    draft = DecoderInfo.load(folder)
    check_pair(path, info.vocab_size, folder, draft.vocab_size)
    most = min(max_model_len, draft.max_position_embeddings)
    weights = folder / WEIGHTS
    if weights.is_file() and weights.stat().st_size <= _SMALL_DRAFT:
        options = replace(options, threads=1)
    kernels = _kernels(options, draft)
    backend = _backend(folder, draft, options, most, kernels)
    return Draft(backend, most, draft.long_context)
