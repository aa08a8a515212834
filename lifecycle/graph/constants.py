"""The constants that a graph stores, as initializers or in `Constant` nodes, and which of them a value is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import onnx_ir as ir

Key = tuple[object, object]
"""Equal for two constants of the same bytes."""
Stored = dict[Key, ir.TensorProtocol]

FORM: Mapping[str, int | None] = {
    "Cast": 1,
    "CastLike": 1,
    "Concat": None,
    "DequantizeLinear": 1,
    "Flatten": 1,
    "Identity": 1,
    "QuantizeLinear": 1,
    "Reshape": 1,
    "Slice": 1,
    "Split": 1,
    "Squeeze": 1,
    "Transpose": 1,
    "Unsqueeze": 1,
}
"""Operators that only change the form of constants -> how many of their inputs, from the first, they are; None: all."""
WITH_SCALES: Mapping[str, int | None] = {**FORM, "DequantizeLinear": 3, "QuantizeLinear": 3}


def all_stored(graph: ir.Graph) -> Stored:
    """All constants of a graph and its subgraphs, each once."""
    values = [v for part in (graph, *graph.subgraphs()) for v in part.initializers.values()]
    values += [node.outputs[0] for node in graph.all_nodes() if node.op_type == "Constant"]
    return dict(found for value in values if (found := _constant(value)) is not None)


def stored(value: ir.Value | None, form: Mapping[str, int | None] = FORM) -> Stored:
    """The constants that a value is, or is made of by operators in `form`; none if it is made of anything else too."""
    found: Stored = {}
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        producer = value.producer()
        if (constant := _constant(value)) is not None:
            found[constant[0]] = constant[1]
        elif producer is not None and producer.op_type in form:
            waiting.extend(producer.inputs[: form[producer.op_type]])
        else:
            return {}
    return found


def elements(tensors: Iterable[ir.TensorProtocol]) -> int:
    return sum(prod(tensor.shape.numpy()) for tensor in tensors)


def _constant(value: ir.Value) -> tuple[Key, ir.TensorProtocol] | None:
    producer = value.producer()
    held = producer.attributes if producer is not None and producer.op_type == "Constant" else None
    if held is not None and (len(held) != 1 or "sparse_value" in held):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.location, tensor.offset or 0), tensor
    # The calls of a function share the attributes of its nodes.
    owner = next(iter(held.values())) if held else tensor
    return ("", id(owner)), tensor
