"""The ONNX Runtime engine: runs an exported decoder with neither torch nor transformers."""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.adapter_bank import AdapterBank, read_weights
from lifecycle.engines.adapters import GRAPH as ADAPTED
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.backend import Block, Row
from lifecycle.engines.base import AdapterWeights, EngineOptions, StrPath
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.decoder import (
    GRAPH,
    HIDDEN_GRAPH,
    HIDDEN_STATES,
    PREFILL_GRAPH,
    WEIGHTS,
    DecoderInfo,
)
from lifecycle.engines.draft_model import Draft
from lifecycle.engines.draft_pair import check_pair
from lifecycle.engines.layout import Inputs, advance, pack
from lifecycle.engines.limits import context_length
from lifecycle.engines.native.library import adds_bytes_exactly, kernels_for
from lifecycle.engines.native.sampling import Columns, native_passes
from lifecycle.engines.native.swap import LOGITS, computes_by_token
from lifecycle.engines.ort_binding import Binding, BoundGraph, Output
from lifecycle.engines.ort_session import (
    CACHE_PARTS,
    CACHE_TYPES,
    cache_names,
    check_signature,
    open_session,
)
from lifecycle.engines.packed_weights import PROVIDERS
from lifecycle.engines.prompt_graph import run_parts
from lifecycle.engines.sampling import NUMPY
from lifecycle.engines.slot_cache import SlotCache
from lifecycle.engines.state import LONGEST_RUN
from lifecycle.engines.windows import Windows
from lifecycle.errors import EngineError

_log = logging.getLogger(__name__)
_MAX_BINDINGS = 64
"""Kept for each graph; each has room for the logits of its rows."""
_SMALL_DRAFT = 32 << 20
"""Bytes of a draft model's weights up to which it runs on one thread: on more it is little faster, and its threads, which
wait for work by spinning, take turns with those of the model on the same cores."""
_MOST_SCORES = 128 << 20
"""Bytes of attention scores, below which all of a layer are held at once: that is up to 1.3 times as fast, since
attention in blocks makes many small products, but what was touched of them stays in memory."""


class OnnxEngine(BatchedEngine):
    """Continuous batching over an exported decoder, on the providers that it was made for."""

    @classmethod
    def open(
        cls,
        path: StrPath,
        options: EngineOptions | None = None,
        providers: Sequence[str] | None = None,
    ) -> Self:
        """As `Engine.open`; `providers` are execution providers to run on instead of those that
        the graph was made for."""
        path, options = Path(path), options or EngineOptions()
        info = DecoderInfo.load(path)
        max_model_len = context_length(options, info.max_position_embeddings)
        kernels = _kernels(options, providers or info.providers)
        layout = AdapterLayout.load(path)
        _warn_of_sums(path, info, kernels)
        backend = _backend(path, info, options, max_model_len, providers, kernels, layout)
        engine = cls(
            backend,
            options=options,
            vocab_size=info.vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=frozenset(info.eos_token_ids),
            long_context=info.long_context,
            windows=Windows(info.windows),
            has_prompt_graph=info.prefill_scheme is not None,
            cuts_freely=_cuts_freely(path, info, options, kernels, layout),
            draft=_draft(path, info, options, max_model_len, providers),
            passes=NUMPY if kernels is None else native_passes(kernels, backend.columns_of),
        )
        engine.kernels = "onnxruntime" if kernels is None else "native"
        return engine


class OrtBackend:
    """A decoder graph with its cache; keys and values are updated in place.

    Slot b is row b of every cache tensor. A step computes rows 0 to the highest slot in use,
    which is a view of the cache, not a copy.
    """

    def __init__(
        self,
        open_graph: Callable[[str, AdapterLayout | None], ort.InferenceSession],
        info: DecoderInfo,
        options: EngineOptions,
        max_model_len: int,
        layout: AdapterLayout | None,
    ) -> None:
        self._open_graph = open_graph
        self._layout = layout
        self._max_model_len = max_model_len
        self._long_offset = info.max_position_embeddings if info.long_context else 0
        self._graph: BoundGraph | None = BoundGraph(
            open_graph(GRAPH, None), LOGITS, info.vocab_size
        )
        self._prefill: BoundGraph | None = None
        if info.prefill_scheme is not None:
            self._prefill = BoundGraph(open_graph(PREFILL_GRAPH, None), LOGITS, info.vocab_size)
        self._adapted: BoundGraph | None = None
        """The graph with slots, once an adapter has been read."""
        self._hidden: BoundGraph | None = None
        """The graph without a head, once hidden states have been asked for."""
        self.hidden_size = info.hidden_size
        self._bank: AdapterBank | None = None
        self._opening = Lock()
        """Of the two: whoever reads the first adapter makes them."""
        num_slots = options.max_num_seqs
        # The attention wants room for the whole width of a step behind every text, also behind
        # those that bring fewer tokens to it.
        capacity = max_model_len + max(options.prefill_chunk, LONGEST_RUN) + options.draft_tokens
        self.cache = SlotCache(
            cache_names(info),
            slots=num_slots,
            heads=info.num_kv_heads,
            capacity=capacity,
            width=info.cache_width,
            dtype=CACHE_TYPES[info.kv_dtype],
            windows=[window for window in info.windows for _ in CACHE_PARTS],
        )
        self._inputs: Inputs = {}
        self._step: object = None
        """What the last step was bound to: its graph, slots and adapters."""
        self._output: Output | None = None
        """What the last step gave."""

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        if self._prefill is None:
            return self._run(rows)
        return run_parts(rows, partial(self._run, graph=self._prefill), self._run)

    def hidden_states(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        if self._hidden is None:
            session = self._open_graph(HIDDEN_GRAPH, None)
            self._hidden = BoundGraph(session, HIDDEN_STATES, self.hidden_size)
        return self._run(rows, self._hidden)

    def _run(self, rows: Sequence[Row], graph: BoundGraph | None = None) -> NDArray[np.float32]:
        """What a graph makes of rows; None takes the one that their adapters need."""
        try:
            return self._compute(rows, graph)
        except Exception as error:
            # Whatever it failed at, the next step binds its inputs anew.
            self._step = None
            text = str(error) or "no memory for the step"
            raise EngineError(f"ONNX Runtime failed: {text}") from error

    def _compute(self, rows: Sequence[Row], graph: BoundGraph | None) -> NDArray[np.float32]:
        entries = None
        if graph is None:
            if self._bank is not None and any(row.adapter for row in rows):
                entries = self._bank.select(rows)
            graph = self._graph if entries is None else self._adapted
        assert graph is not None
        decodes = all(len(row.tokens) == row.num_logits == 1 for row in rows)
        binding = self._binding(graph, 1 + max(row.slot for row in rows), entries)
        step = (binding, [(row.slot, row.adapter) for row in rows]) if decodes else None
        if decodes and step == self._step:
            advance(self._inputs, rows, self._long_offset)
        else:
            self._inputs = pack(rows, self._max_model_len, self._long_offset)
            if self._bank is not None and entries is not None:
                self._inputs |= self._bank.inputs(rows, entries)
            for name in graph.step_inputs & self._inputs.keys():
                binding.binding.bind_cpu_input(name, self._inputs[name])
        self._step = step
        self._output = binding.fetch(len(self._inputs["logit_index"]))
        graph.session.run_with_iobinding(binding.binding)
        return self._output.values

    def columns_of(self, logits: NDArray[np.float32]) -> Columns | None:
        """Those of what the last step gave, if its graph tells them; None for other logits."""
        output = self._output
        return output.columns if output is not None and output.values is logits else None

    @property
    def adapter_slots(self) -> int:
        return 0 if self._layout is None else self._layout.slots

    def read_adapter(self, folder: Path) -> AdapterWeights:
        if self._layout is None:
            raise EngineError(
                "this model has no adapter slots: export it with adapters, such as "
                "{slots: 8, rank: 16}, or merge the adapter"
            )
        assert self._graph is not None
        with self._opening:
            weights = read_weights(folder, self._layout)
            if self._adapted is None:
                session = self._open_graph(ADAPTED, self._layout)
                self._adapted = BoundGraph(session, LOGITS, self._graph.width)
            if self._bank is None:
                self._bank = AdapterBank(self._layout, self._adapted.step_inputs)
            return self._bank.entry_of(weights)

    def load_adapter(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        if self._bank is None or self._adapted is None:
            raise EngineError(
                "the adapter was read by another engine: read it with this engine's read_adapter"
            )
        return self._bank.load(weights, instead_of)

    def unload_adapter(self, number: int) -> None:
        assert self._bank is not None
        self._bank.unload(number)

    @property
    def bytes_per_token(self) -> int:
        return self.cache.bytes_per_token

    def read_cache(self, slot: int, start: int, stop: int) -> Block:
        return self.cache.read(slot, start, stop)

    def write_cache(self, slot: int, start: int, block: Block, count: int | None = None) -> None:
        self.cache.write(slot, start, block if count is None else block[:, :, :count])

    def copy_cache(self, source: int, target: int, stop: int) -> None:
        self.cache.copy(source, target, stop)

    def forget(self, slot: int, start: int = 0) -> None:
        self.cache.forget(slot, start)

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        self.cache.forget_passed(slot, count, before)

    def close(self) -> None:
        self._graph = self._prefill = self._adapted = self._hidden = None
        self._bank = self._step = self._output = None
        self.cache.clear()

    def _binding(self, graph: BoundGraph, num_rows: int, entries: range | None) -> Binding:
        """What a step of `num_rows` rows over some adapters is bound to."""
        key = (num_rows, entries)
        if key not in graph.bindings:
            if len(graph.bindings) >= _MAX_BINDINGS:
                graph.bindings.clear()
            binding = Binding(graph, self.cache.rows(num_rows))
            if self._bank is not None and entries is not None:
                binding.bind(self._bank.weights(entries))
            graph.bindings[key] = binding
        return graph.bindings[key]


def _backend(
    path: Path,
    info: DecoderInfo,
    options: EngineOptions,
    max_model_len: int,
    providers: Sequence[str] | None,
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
            providers or info.providers,
            options.threads,
            options.packed_weights,
            whole_scores=_whole_scores(info, options, max_model_len),
            kernels=kernels,
        )
        check_signature(session, info, path / name, slots, output, is_native=kernels is not None)
        return session

    return OrtBackend(open_graph, info, options, max_model_len, layout)


def _cuts_freely(
    path: Path,
    info: DecoderInfo,
    options: EngineOptions,
    kernels: Path | None,
    layout: AdapterLayout | None,
) -> bool:
    """Whether our kernels compute all of a model that depends on how a text is cut; only the prefix cache asks."""
    if kernels is None or not options.prefix_cache_bytes:
        return False
    graphs = [GRAPH]
    if info.prefill_scheme is not None:
        graphs.append(PREFILL_GRAPH)
    if layout is not None:
        graphs.append(ADAPTED)
    try:
        return all(computes_by_token((path / graph).read_bytes()) for graph in graphs)
    except (ValueError, IndexError, KeyError, OSError):
        # Whoever opens the graph says what is wrong with it.
        return False


def _kernels(options: EngineOptions, providers: Sequence[str]) -> Path | None:
    """The library of our kernels, where they are to compute the graphs."""
    wanted = options.kernels
    conflict = None
    if tuple(providers) != PROVIDERS:
        conflict = f"the graph runs on {providers[0]}"
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
    path: Path,
    info: DecoderInfo,
    options: EngineOptions,
    max_model_len: int,
    providers: Sequence[str] | None,
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
    kernels = _kernels(options, providers or draft.providers)
    backend = _backend(folder, draft, options, most, providers, kernels)
    return Draft(backend, most, draft.long_context)
