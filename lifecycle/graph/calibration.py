"""What the products and the cache of a decoder get, layer by layer, when it runs over calibration texts.

Only one layer's weights and the activations between two layers are in memory. A layer whose
matrices were replaced hands its successor what it gives with the new ones, so that each layer
is quantised for the inputs that it will get.
"""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
from lifecycle.engines.layout import MIN_WIDTH, pack
from lifecycle.engines.limits import usable_cores
from lifecycle.errors import StageError
from lifecycle.graph.rotation import Rotation

Floats = NDArray[np.float32]
Values = dict[str, NDArray[Any]]

_BATCH_TOKENS = 4096
"""Tokens that run together, with all that a layer makes of them in memory."""
_CACHE = "past_key_values."


@dataclass
class _Batch:
    """Some texts, and what the graph has made of them so far."""

    inputs: Values
    num_rows: int
    width: int
    live: Values = field(default_factory=dict[str, Any])
    """Values between the pieces of the graph that are done and those to come."""


class Calibration:
    """A walk through the layers of an exported float32 decoder."""

    def __init__(self, folder: Path, texts: Sequence[Sequence[int]]) -> None:
        """`texts` are token ids; each is read from its beginning.

        Raises:
            StageError: there are no texts, or one is longer than the model can read.
        """
        info = DecoderInfo.load(folder)
        longest = max(map(len, texts), default=0)
        if not 0 < longest <= (info.long_context or info.max_position_embeddings):
            raise StageError(f"calibration texts of up to {longest} tokens do not fit the model")
        self._folder, self._info = folder, info
        graph = onnx.load(folder / GRAPH, load_external_data=False).graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._graph_inputs = {value.name: value for value in graph.input}
        self._pieces = _split(graph.node)
        self._reads = {node.name: node.input[0] for node in graph.node if node.op_type == "Gemm"}
        self._weight_of = {n.name: n.input[1] for n in graph.node if n.op_type == "Gemm"}
        self._piece_of = {node.name: i for i, piece in enumerate(self._pieces) for node in piece}
        self._batches = [self._batch(part) for part in _batches(texts)]
        self._at = -1
        self._measured: dict[tuple[str, str], Floats] = {}
        self._replaced: dict[str, Floats] = {}

    def second_moments(self, product: str) -> Floats:
        """Xᵀ·X, [in, in], over all that a product reads, as a mean over tokens. Products must be
        asked for in the order of the graph, layer after layer."""
        total = sum(len(batch.inputs["input_ids"]) for batch in self._batches)

        def moments(rows: Floats) -> Floats:
            return (rows.T @ rows / total).astype(np.float32)

        return self._measure(product, "moments", moments, np.add)

    def largest(self, product: str) -> Floats:
        """The largest absolute value of each input of a product, [in]; in the order of the graph."""
        return self._measure(product, "largest", lambda rows: np.abs(rows).max(axis=0), np.maximum)

    def cached(self, layer: int) -> tuple[Floats, Floats]:
        """The keys, rotated, and the values that a layer stores of all tokens, text after text,
        [kv_heads, tokens, head_size] each; layers in order."""
        attend = f"layers.{layer}.self_attn.attend"
        self._go_to(self._piece_of[attend])
        names = [f"present.{layer}.{part}" for part in ("key", "value")]
        # What follows in the layer is not needed for them.
        count = [node.name for node in self._pieces[self._at]].index(attend) + 1
        nodes = self._pieces[self._at][:count]
        session = self._session(nodes, names)
        rows: tuple[list[Floats], list[Floats]] = ([], [])
        for batch in self._batches:
            found = self._run(session, nodes, batch, names)
            for name, part in zip(names, rows, strict=True):
                lengths = batch.inputs["query_seqlens"]
                part += [row[:, :length] for row, length in zip(found[name], lengths, strict=True)]
        return np.concatenate(rows[0], axis=1), np.concatenate(rows[1], axis=1)

    def replace(self, product: str, weights: Floats) -> None:
        """Let a product of the current layer have other weights [out, in] from here on."""
        self._replaced[self._weight_of[product]] = weights

    def positions(self) -> NDArray[np.int64]:
        """Where in its text each token stands, [tokens], text after text."""
        return np.concatenate([batch.inputs["position_ids"][:, 0] for batch in self._batches])

    def rotation(self, layer: int) -> Rotation | None:
        """How a layer rotates its keys; None if it does not."""
        piece = self._pieces[self._piece_of[f"layers.{layer}.self_attn.attend"]]
        for node in piece:
            known = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            is_fused = node.op_type == "GroupQueryAttention" and known["do_rotary"]
            if is_fused or node.op_type == "RotaryEmbedding":
                names = node.input[7:9] if is_fused else node.input[2:4]
                cos, sin = (self._read(self._constants[name]) for name in names)
                marks = ("rotary_interleaved", "interleaved")
                return Rotation(cos, sin, any(known.get(mark) for mark in marks))
        return None

    def _go_to(self, piece: int) -> None:
        """Run all pieces before this one."""
        if piece < self._at:
            raise ValueError("a layer was passed; they are walked once")
        while self._at < piece:
            self._leave()
            self._at += 1

    def _measure(
        self,
        product: str,
        kind: str,
        measure: Callable[[Floats], Floats],
        combine: Callable[[Floats, Floats], Floats],
    ) -> Floats:
        """A measure of what a product reads, taken of the rows of each batch and combined. All
        products of a piece are measured in one run."""
        self._go_to(self._piece_of[product])
        if (kind, self._reads[product]) not in self._measured:
            self._read_inputs(kind, measure, combine)
        return self._measured[kind, self._reads[product]]

    def _read_inputs(
        self,
        kind: str,
        measure: Callable[[Floats], Floats],
        combine: Callable[[Floats, Floats], Floats],
    ) -> None:
        """Run the piece as it is, and measure what its products read."""
        nodes = self._pieces[self._at]
        wanted = list(dict.fromkeys(n.input[0] for n in nodes if n.op_type == "Gemm"))
        known = [name for name in wanted if name in self._outside(nodes)]
        made = [name for name in wanted if name not in known]
        session = self._session(nodes, made) if made else None
        for batch in self._batches:
            found = {name: batch.live[name] for name in known}
            if session is not None:
                found |= self._run(session, nodes, batch, made)
            for name, x in found.items():
                value = measure(x.reshape(-1, x.shape[-1]))
                before = self._measured.get((kind, name))
                self._measured[kind, name] = value if before is None else combine(before, value)

    def _leave(self) -> None:
        """Run the current piece as it has become, for what later pieces read of it."""
        if self._at < 0:
            return
        nodes = self._pieces[self._at]
        made = {name for node in nodes for name in node.output if name}
        later = [node for piece in self._pieces[self._at + 1 :] for node in piece]
        needed = {name for node in later for name in node.input}
        wanted = sorted(made & needed)
        session = self._session(nodes, wanted)
        for batch in self._batches:
            found = self._run(session, nodes, batch, wanted)
            batch.live = {k: v for k, v in batch.live.items() if k in needed} | found
        self._replaced.clear()
        self._measured.clear()

    def _session(self, nodes: Sequence[NodeProto], outputs: Sequence[str]) -> ort.InferenceSession:
        """The nodes as a model of their own, its weights read into memory."""
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
        external = [t for t in constants if t.data_location == TensorProto.EXTERNAL]
        values = [ort.OrtValue.ortvalue_from_numpy(self._read(tensor)) for tensor in external]
        options.add_external_initializers([tensor.name for tensor in external], values)
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def _run(
        self,
        session: ort.InferenceSession,
        nodes: Sequence[NodeProto],
        batch: _Batch,
        outputs: Sequence[str],
    ) -> Values:
        info = self._info
        shape = (batch.num_rows, info.num_kv_heads, batch.width, info.head_size)
        feeds = {
            name: np.zeros(shape, np.float32)
            if name.startswith(_CACHE)
            else batch.inputs[name]
            if name in batch.inputs
            else batch.live[name]
            for name in self._outside(nodes)
        }
        found: Any = session.run(list(outputs), feeds)
        return dict(zip(outputs, found, strict=True))

    def _outside(self, nodes: Iterable[NodeProto]) -> list[str]:
        """What nodes read that is neither constant nor made by one of them."""
        nodes = list(nodes)
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        return [name for name in read if name not in made and name not in self._constants]

    def _read(self, tensor: TensorProto) -> NDArray[Any]:
        if tensor.name in self._replaced:
            return self._replaced[tensor.name]
        where = ExternalDataInfo(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count = (where.length or 0) // dtype.itemsize
        file = self._folder / where.location
        return np.fromfile(file, dtype, count, offset=where.offset or 0).reshape(tensor.dims)

    def _batch(self, texts: Sequence[Sequence[int]]) -> _Batch:
        rows = [Row(i, 0, list(text), num_logits=len(text)) for i, text in enumerate(texts)]
        width = max(MIN_WIDTH, *map(len, texts))
        return _Batch(dict(pack(rows, width)), len(texts), width)


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
    """The nodes before the layers, of each layer, and behind the last one."""
    pieces: list[list[NodeProto]] = [[]]
    layer = ""
    for node in nodes:
        found = re.match(r"layers\.\d+\.", node.name)
        name = found[0] if found else ""
        if name != layer:
            pieces.append([])
            layer = name
        pieces[-1].append(node)
    return pieces
