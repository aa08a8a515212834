"""An exported decoder as a backend: its graphs, its cache and its adapters."""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.adapter_bank import AdapterBank, read_weights
from lifecycle.engines.adapters import GRAPH as ADAPTED
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.backend import Block, Row
from lifecycle.engines.base import AdapterWeights
from lifecycle.engines.decoder import HIDDEN_GRAPH, HIDDEN_STATES, PREFILL_GRAPH, DecoderInfo
from lifecycle.engines.device_cache import DeviceCache
from lifecycle.engines.layout import Inputs, advance, pack
from lifecycle.engines.native.sampling import Columns
from lifecycle.engines.native.swap import LOGITS
from lifecycle.engines.ort_binding import Binding, BoundGraph, Output
from lifecycle.engines.prompt_graph import run_parts
from lifecycle.engines.slot_cache import SlotCache
from lifecycle.engines.tensor_cache import TensorCache
from lifecycle.errors import EngineError

_MAX_BINDINGS = 64
"""Kept for each graph."""
OpenGraph = Callable[[str, AdapterLayout | None], ort.InferenceSession]
"""Opens a graph of a folder by its name, with slots for adapters or without."""


class OrtBackend:
    """A decoder graph with its cache; keys and values are updated in place.

    Slot b is row b of every cache tensor. A step computes rows 0 to the highest slot in use,
    which is a view of the cache, not a copy.
    """

    can_roll_back = True
    """Attention reads and writes a slot up to where its row ends, and no further."""

    def __init__(
        self,
        open_graph: OpenGraph,
        session: ort.InferenceSession,
        cache: SlotCache | TensorCache | DeviceCache,
        info: DecoderInfo,
        max_model_len: int,
        layout: AdapterLayout | None,
    ) -> None:
        """`session` is that of the graph by which decoding steps are computed."""
        self._open_graph = open_graph
        self._layout = layout
        self._max_model_len = max_model_len
        self._long_offset = info.max_position_embeddings if info.long_context else 0
        self.providers: Sequence[str] = session.get_providers()
        """Those that the graph runs on."""
        self._graph: BoundGraph | None = BoundGraph(session, LOGITS, info.vocab_size)
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
        self._cache = cache
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
        num_rows = self._cache.num_rows(1 + max(row.slot for row in rows))
        binding = self._binding(graph, num_rows, entries)
        step = (binding, [(row.slot, row.adapter) for row in rows]) if decodes else None
        if decodes and step == self._step:
            advance(self._inputs, rows, self._long_offset)
            changed = graph.copied_inputs
        else:
            self._inputs = pack(rows, self._max_model_len, self._long_offset, num_rows)
            if self._bank is not None and entries is not None:
                self._inputs |= self._bank.inputs(rows, entries)
            changed = graph.step_inputs
        for name in changed & self._inputs.keys():
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

    def close(self) -> None:
        self._graph = self._prefill = self._adapted = self._hidden = None
        self._bank = self._step = self._output = None
        self._cache.clear()

    def _binding(self, graph: BoundGraph, num_rows: int, entries: range | None) -> Binding:
        """What a step of `num_rows` rows over some adapters is bound to."""
        key = (num_rows, entries)
        if key not in graph.bindings:
            if len(graph.bindings) >= _MAX_BINDINGS:
                graph.bindings.clear()
            graph.bindings[key] = Binding(graph)
            self._cache.bind(graph.bindings[key].binding, num_rows)
        binding = graph.bindings[key]
        if self._bank is not None and entries is not None:
            bound = binding.bound_adapters
            if not bound or (graph.copied_inputs and bound != self._bank.state):
                binding.bind(self._bank.weights(entries), self._bank.state)
        return binding


class CopyingOrtBackend(OrtBackend):
    """The same over a cache that can be copied by ranges of tokens."""

    def __init__(
        self,
        open_graph: OpenGraph,
        session: ort.InferenceSession,
        cache: SlotCache | TensorCache,
        info: DecoderInfo,
        max_model_len: int,
        layout: AdapterLayout | None,
    ) -> None:
        super().__init__(open_graph, session, cache, info, max_model_len, layout)
        self.cache = cache

    @property
    def bytes_per_token(self) -> int:
        return self.cache.bytes_per_token

    def read_cache(self, slot: int, start: int, stop: int) -> Block:
        return self.cache.read(slot, start, stop)

    def write_cache(self, slot: int, start: int, block: Block, count: int | None = None) -> None:
        self.cache.write(slot, start, block if count is None else block[:, :, :count])

    def copy_cache(self, source: int, target: int, stop: int, start: int = 0) -> None:
        self.cache.copy(source, target, stop, start)

    def forget(self, slot: int, start: int = 0) -> None:
        self.cache.forget(slot, start)

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        self.cache.forget_passed(slot, count, before)
