"""A float32 decoder cut at its layers and in their middle; each piece runs over texts as a model of
its own.

Only one piece's weights, and what it makes of one batch of texts, are in memory; the activations of all texts between
two pieces lie in files.
"""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo

from lifecycle.engines.backend import Row
from lifecycle.engines.decoder import GRAPH, DecoderInfo
from lifecycle.engines.heap import trim_heap
from lifecycle.engines.layout import MIN_WIDTH, pack
from lifecycle.engines.limits import usable_cores
from lifecycle.engines.ort_session import PAST
from lifecycle.errors import StageError
from lifecycle.graph.scratch import mapped

Floats = NDArray[np.float32]
Values = dict[str, NDArray[Any]]

LOGITS = "logits"
LOGIT_INDEX = "logit_index"
_PARTS = 64
"""In which the logits of a batch come."""
_TOGETHER = 8
"""Parts that are computed together: the weights of a head are read once for them."""
_BATCH_TOKENS = 4096
"""Tokens that run together, with all that a layer makes of them in memory."""
_LARGE = 1 << 20
"""Bytes from which an array that stays for a while lies in a file."""


@dataclass
class Batch:
    """Some texts, and what the graph has made of them so far."""

    inputs: Values
    num_rows: int
    width: int
    live: Values = field(default_factory=dict[str, Any])
    """Values between the pieces of the graph that are done and those to come."""


class Pieces:
    """The nodes before the layers of an exported decoder, of each layer's attention and feed-forward
    part, and behind the last one, and texts to run them over."""

    def __init__(
        self,
        folder: Path,
        texts: Sequence[Sequence[int]],
        scored: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        """`texts` are token ids; each is read from its beginning, and has logits after its last
        `scored` tokens, by default after each. What is live between pieces is kept in files in `scratch`, by default
        where the system keeps such files.

        Raises:
            StageError: there are no texts, or one is longer than the model can read.
        """
        info = DecoderInfo.load(folder)
        longest = max(map(len, texts), default=0)
        if not 0 < longest <= (info.long_context or info.max_position_embeddings):
            raise StageError(f"calibration texts of up to {longest} tokens do not fit the model")
        self._folder, self._info, self._scored, self._scratch = folder, info, scored, scratch
        graph = onnx.load(folder / GRAPH, load_external_data=False).graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._graph_inputs = {value.name: value for value in graph.input}
        self.nodes = _split(graph.node)
        """The nodes of each piece."""
        self.holding = {node.name: i for i, piece in enumerate(self.nodes) for node in piece}
        """The name of each node -> its piece."""
        self.batches = [self._batch(part) for part in _batches(texts)]

    def products(self, piece: int) -> list[NodeProto]:
        """The products of a piece with weights."""
        return [node for node in self.nodes[piece] if node.op_type == "Gemm"]

    def outside(self, piece: int) -> list[str]:
        """What a piece reads that is neither constant nor made by it."""
        return self._outside(self.nodes[piece])

    def _outside(self, nodes: Sequence[NodeProto]) -> list[str]:
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        return [name for name in read if name not in made and name not in self._constants]

    def constant(self, name: str) -> NDArray[Any]:
        """A constant of the graph, by its name."""
        tensor = self._constants[name]
        where = ExternalDataInfo(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count = (where.length or 0) // dtype.itemsize
        file = self._folder / where.location
        return np.fromfile(file, dtype, count, offset=where.offset or 0).reshape(tensor.dims)

    def handed_on(self, piece: int) -> list[str]:
        """What a piece makes for later ones; of the last one, the logits."""
        made = {name for node in self.nodes[piece] for name in node.output if name}
        return sorted(made & self._needed(piece))

    def session(
        self, piece: int, outputs: Sequence[str], changed: Mapping[str, Floats]
    ) -> ort.InferenceSession:
        """What of a piece leads to `outputs`, as a model of its own, its constants as they are in their
        file, or taken from `changed`."""
        # What those before have left takes no room beside it.
        trim_heap()
        nodes = _leading(self.nodes[piece], outputs)
        inputs = [
            self._graph_inputs.get(name)
            or onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in self._outside(nodes)
        ]
        used = {name for node in nodes for name in node.input}
        constants = [self._constants[name] for name in sorted(used & self._constants.keys())]
        graph = onnx.helper.make_graph(
            list(nodes),
            "piece",
            inputs,
            [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
            constants,
        )
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
        options = ort.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        options.log_severity_level = 3
        # An arena grows by doubling, and there is one for each session: to keep it pays for none that runs once.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        # What does not change stays mapped from its file instead of being copied.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._folder)
        )
        replaced = [tensor.name for tensor in constants if tensor.name in changed]
        options.add_external_initializers(
            replaced, [ort.OrtValue.ortvalue_from_numpy(changed[name]) for name in replaced]
        )
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def logits(self, session: ort.InferenceSession, batch: Batch, live: Values) -> Iterator[Floats]:
        """The logits of a batch, some tokens at a time, [tokens, vocab]; `session` is the last piece's."""
        index = batch.inputs[LOGIT_INDEX]
        parts = [part for part in np.array_split(index, _PARTS) if len(part)]
        for at in range(0, len(parts), _TOGETHER):
            trim_heap()
            group = parts[at : at + _TOGETHER]
            inputs = batch.inputs | {LOGIT_INDEX: np.concatenate(group)}
            found = self.run(session, replace(batch, inputs=inputs), [LOGITS], live)[LOGITS]
            yield from np.split(found, np.cumsum([len(part) for part in group[:-1]]))

    def run(
        self, session: ort.InferenceSession, batch: Batch, outputs: Sequence[str], live: Values
    ) -> Values:
        """Outputs of a session of a piece for a batch, from `live`."""
        info = self._info
        shape = (batch.num_rows, info.num_kv_heads, batch.width, info.head_size)
        feeds = {
            name: np.zeros(shape, np.float32)
            if name.startswith(PAST)
            else batch.inputs[name]
            if name in batch.inputs
            else live[name]
            for name in (value.name for value in session.get_inputs())
        }
        found: Any = session.run(list(outputs), feeds)
        return dict(zip(outputs, found, strict=True))

    def step(self, session: ort.InferenceSession, piece: int, batch: Batch, live: Values) -> Values:
        """What is live behind a piece, from what is live before it; `session` gives what the
        piece hands on."""
        found = self.run(session, batch, self.handed_on(piece), live)
        needed = self._needed(piece)
        kept = {name: value for name, value in live.items() if name in needed}
        return kept | {name: self.kept(value) for name, value in found.items()}

    def kept(self, value: NDArray[Any]) -> NDArray[Any]:
        """The same values, in a file if they are many."""
        if value.nbytes < _LARGE:
            return value
        return mapped([value], value.shape, value.dtype, self._scratch)

    def _needed(self, piece: int) -> set[str]:
        later = [node for nodes in self.nodes[piece + 1 :] for node in nodes]
        return {LOGITS, *(name for node in later for name in node.input)}

    def _batch(self, texts: Sequence[Sequence[int]]) -> Batch:
        counts = [min(len(text), self._scored or len(text)) for text in texts]
        rows = [Row(i, 0, list(text), counts[i]) for i, text in enumerate(texts)]
        width = max(MIN_WIDTH, *map(len, texts))
        return Batch(dict(pack(rows, width)), len(texts), width)


def _leading(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """The nodes that `outputs` are made by."""
    wanted, found = set(outputs), list[NodeProto]()
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            found.append(node)
    return found[::-1]


def _batches(texts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    found: list[list[Sequence[int]]] = []
    room = 0
    for text in texts:
        if not found or len(text) > room:
            found.append([])
            room = _BATCH_TOKENS
        found[-1].append(text)
        room -= len(text)
    return found


def _split(nodes: Iterable[NodeProto]) -> list[list[NodeProto]]:
    """The nodes before the layers, of each layer's attention and feed-forward part, and behind the last
    one."""
    pieces: list[list[NodeProto]] = [[]]
    part = ""
    for node in nodes:
        found = re.match(r"layers\.\d+\.(mlp\.)?", node.name)
        name = found[0] if found else ""
        if name != part:
            pieces.append([])
            part = name
        pieces[-1].append(node)
    return pieces
