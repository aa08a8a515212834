"""Writing the external data of a graph: one file, tensor after tensor, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes. A cache line and the widest vector register; a runtime maps any offset."""
_BLOCK = 1 << 20
"""Bytes that are copied at a time."""
_SMALL = 1 << 10
"""Bytes. Smaller constants stay in the graph, where shape inference sees them."""


class WeightFile:
    """Appends tensors to one file; a tensor is never held whole."""

    def __init__(self, path: Path, on_write: Callable[[int], None] | None = None) -> None:
        """`on_write(bytes)` is called after every block with the size of the file so far."""
        self.path = path
        self._on_write = on_write or (lambda _: None)
        self._file = path.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        blocks: Iterable[NDArray[Any]],
    ) -> ir.Value:
        """Write a tensor whose values come in order, in blocks of any size.

        Raises:
            ValueError: the blocks hold more or fewer bytes than `shape` asks for.
        """
        start = self._file.tell()
        start += -start % ALIGNMENT
        self._file.seek(start)
        for block in blocks:
            self._file.write(np.ascontiguousarray(block).data.cast("B"))
            self._on_write(self._file.tell())
        # What is written can be read at once, through the tensor.
        self._file.flush()
        length = self._file.tell() - start
        expected = -(-prod(shape) * dtype.bitwidth // 8)
        if length != expected:
            raise ValueError(f"{name}: {length} bytes written, {shape} needs {expected}")
        tensor = ir.ExternalTensor(
            self.path.name,
            start,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )
        return ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor
        )

    def add_array(self, name: str, values: NDArray[Any]) -> ir.Value:
        """Write a tensor that is small enough to be in memory."""
        dtype = ir.DataType.from_numpy(values.dtype)
        return self.add(name, dtype, values.shape, [values])


def move_weights(graph: ir.Graph, weights: WeightFile) -> None:
    """Copy what a graph still uses of other files, and large constants of its own, to `weights`;
    drop what it does not use."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        is_external = isinstance(tensor, ir.ExternalTensor)
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
        elif tensor.dtype == ir.DataType.STRING:
            continue
        elif Path(tensor.path) != weights.path if is_external else tensor.nbytes >= _SMALL:
            shape = tuple(tensor.shape.numpy())
            value.const_value = weights.add(name, tensor.dtype, shape, _bytes(tensor)).const_value


def _bytes(tensor: ir.TensorProtocol) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor; of another file, some at a time."""
    if not isinstance(tensor, ir.ExternalTensor):
        yield np.frombuffer(tensor.tobytes(), np.uint8)
        return
    start, stop = tensor.offset or 0, (tensor.offset or 0) + tensor.nbytes
    for at in range(start, stop, _BLOCK):
        yield np.fromfile(tensor.path, np.uint8, min(_BLOCK, stop - at), offset=at)
