"""A graph that is bound to what it reads and writes once, and run many times."""

# onnxruntime ships no type information.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.base import AdapterWeights
from lifecycle.engines.native.sampling import Columns, num_columns
from lifecycle.engines.native.swap import TOPS
from lifecycle.engines.ort_session import HOST


class BoundGraph:
    """A session, and what it has been bound to by rows and adapters."""

    def __init__(self, session: ort.InferenceSession, output: str, width: int) -> None:
        """`output` is what it gives besides its cache, [L, width]."""
        self.session, self.output, self.width = session, output, width
        self.step_inputs = {i.name for i in session.get_inputs()}
        inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        self.copied_inputs = {each.name for each, info in inputs if info.name != HOST}
        """Those that a device reads: they are copied when they are bound, so what changes must be bound anew."""
        self.tells_tops = any(o.name == TOPS for o in session.get_outputs())
        self.bindings: dict[tuple[int, range | None], Binding] = {}
        self._values = np.empty((0, width), np.float32)
        self._tops = np.empty((0, num_columns(width)), np.float32)

    def room(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Where rows of the output and their columns are written: `count` of them or more. All steps share it, for only
        the last one's are read; it doubles, so that what was bound before keeps little of what it was."""
        if count > len(self._values):
            self._values = np.empty((max(count, 2 * len(self._values)), self.width), np.float32)
            self._tops = np.empty((len(self._values), self._tops.shape[1]), np.float32)
        return self._values, self._tops


class Output(NamedTuple):
    """What a step gives."""

    values: NDArray[np.float32]
    columns: Columns | None
    """Of logits, where the graph tells them."""


class Binding:
    """The cache and the output of steps over so many slots, bound once."""

    def __init__(self, graph: BoundGraph) -> None:
        """The cache is bound by whoever has it."""
        self.binding = ort.IOBinding(graph.session)
        self._graph = graph
        self._output: Output | None = None
        self.bound_adapters = 0
        """The state of the adapters whose weights are bound, if any are."""

    def bind(self, weights: AdapterWeights, state: int) -> None:
        """Bind the weights of adapters in some state of theirs."""
        self.bound_adapters = state
        for name, array in weights.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    def fetch(self, count: int) -> Output:
        """Where the next run writes `count` rows of its output."""
        found, columns = self._graph.room(count)
        output = self._output
        if output is not None and count == len(output.values) and output.values.base is found:
            return output
        values, tops = found[:count], columns[:count]
        places = values.ctypes.data, tops.ctypes.data
        name, tells_tops = self._graph.output, self._graph.tells_tops
        self.binding.bind_output(name, "cpu", 0, np.float32, values.shape, places[0])
        if tells_tops:
            self.binding.bind_output(TOPS, "cpu", 0, np.float32, tops.shape, places[1])
        self._output = Output(values, (tops, places) if tells_tops else None)
        return self._output
