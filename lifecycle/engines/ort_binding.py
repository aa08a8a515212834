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
        self._name, self._tells_tops = graph.output, graph.tells_tops
        self._output: Output | None = None
        self.bound_adapters = 0
        """The state of the adapters whose weights are bound, if any are."""
        self._found = np.empty((0, graph.width), np.float32)
        self._tops = np.empty((0, num_columns(graph.width)), np.float32)

    def bind(self, weights: AdapterWeights, state: int) -> None:
        """Bind the weights of adapters in some state of theirs."""
        self.bound_adapters = state
        for name, array in weights.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    def fetch(self, count: int) -> Output:
        """Where the next run writes `count` rows of its output."""
        if self._output is not None and count == len(self._output.values):
            return self._output
        self._output = None
        if count > len(self._found):
            found = np.empty((count, self._found.shape[1]), np.float32)
            self._tops = np.empty((count, self._tops.shape[1]), np.float32)
            self._found = found
        values, tops = self._found[:count], self._tops[:count]
        places = values.ctypes.data, tops.ctypes.data
        self.binding.bind_output(self._name, "cpu", 0, np.float32, values.shape, places[0])
        if self._tells_tops:
            self.binding.bind_output(TOPS, "cpu", 0, np.float32, tops.shape, places[1])
        self._output = Output(values, (tops, places) if self._tells_tops else None)
        return self._output
