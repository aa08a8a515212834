"""What tensors inside a graph hold when it runs over samples: a few tensors, one sample at a time."""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.decoder import GRAPH
from lifecycle.engines.layout import MIN_WIDTH, pack
from lifecycle.engines.limits import usable_cores
from lifecycle.engines.ort_session import CACHE_TYPES, PAST, type_name
from lifecycle.errors import StageError
from lifecycle.graph.ranges import Histogram

Sample = Mapping[str, NDArray[Any]]
"""An array for each input of a graph."""

_TOKENS = "input_ids"
_CACHE_TYPES = {type_name(dtype): dtype for dtype in CACHE_TYPES.values()}
"""The types of a cache as ONNX Runtime calls them."""
_TENSORS = 16
"""Tensors that are kept of a run. The graph runs once for so many, over all samples."""


def histograms(
    folder: Path,
    names: Sequence[str],
    samples: Sequence[Sample],
    on_done: Callable[[int, int], None],
) -> dict[str, Histogram]:
    """Histograms of the tensors called `names` over all samples.

    Raises:
        StageError: the graph cannot compute a sample, or a value is not finite.
    """
    found = {name: Histogram(name) for name in names}
    groups = [names[at : at + _TENSORS] for at in range(0, len(names), _TENSORS)]
    done, total = 0, len(groups) * len(samples)
    for group in groups:
        session = _tapped(folder, group)
        for number, sample in enumerate(samples, start=1):
            values = run(session, sample, number)
            for name, array in zip(group, values, strict=True):
                found[name].add(array)
            on_done(done := done + 1, total)
    return found


def run(
    session: ort.InferenceSession,
    sample: Sample,
    number: int,
    outputs: Sequence[str] | None = None,
) -> list[NDArray[Any]]:
    """Outputs of a session, all or some, for a sample, the `number`th, which may have arrays that
    this session does not take; a decoder begins with an empty cache of its own type.

    Raises:
        StageError: it cannot be computed.
    """
    ports = session.get_inputs()
    feeds = {port.name: sample[port.name] for port in ports if port.name in sample}
    for port in ports:
        if port.name.startswith(PAST) and port.name not in sample and _TOKENS in sample:
            feeds[port.name] = _empty_cache(port, max(MIN_WIDTH, len(sample[_TOKENS])))
    try:
        found: Any = session.run(outputs, feeds)
    except Exception as error:
        raise StageError(f"sample {number} cannot be computed: {error}") from error
    return found


def _empty_cache(port: ort.NodeArg, capacity: int) -> NDArray[Any]:
    """Room for the keys or values of one text, of the type that the decoder stores."""
    _, heads, _, width = port.shape
    dtype = _CACHE_TYPES.get(port.type, np.dtype(np.float32))
    return np.zeros((1, heads, capacity, width), dtype)


def decoder_samples(texts: Iterable[Sequence[int]]) -> Iterator[Sample]:
    """The inputs of a decoder that reads each text, token ids, from its beginning; whatever its
    cache is, which `run` adds."""
    for text in texts:
        width = max(MIN_WIDTH, len(text))
        yield pack([Row(0, 0, list(text), num_logits=len(text))], width)


def _tapped(folder: Path, names: Sequence[str]) -> ort.InferenceSession:
    """The part of a graph that `names` depend on, which are its outputs."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    graph = model.graph
    wanted, kept = set(names), list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= _reads(node)
    del graph.node[:], graph.output[:]
    graph.node.extend(reversed(kept))
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    inputs = [value for value in graph.input if value.name in wanted]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend(constants)
    graph.input.extend(inputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 4
    # Weights stay mapped from their file instead of being copied into another layout.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, its subgraphs included."""
    found = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                found |= _reads(inner)
    return found
