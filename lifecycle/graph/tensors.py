"""Where the weights of a graph come from: the tensors of a checkpoint, under the names and in the
layout that its architecture has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lifecycle.errors import CheckpointError
from lifecycle.graph.checkpoint import Checkpoint
from lifecycle.graph.spec import DecoderSpec, Experts
from lifecycle.graph.weights import WeightFile

Kind = Literal["weight", "bias"]
Floats = NDArray[np.float32]


class TensorSource:
    """Copies weights from a checkpoint to the weight file of a graph.

    Every method that copies raises `CheckpointError` for a tensor that is missing, damaged or of
    another shape than the config says.
    """

    def __init__(self, spec: DecoderSpec, checkpoint: Checkpoint, weights: WeightFile) -> None:
        self._spec, self._checkpoint, self._weights = spec, checkpoint, weights
        bare = f"{spec.names.of('embed_tokens')}.weight"
        self._prefix = "" if bare in checkpoint.tensors else spec.names.prefix
        self.embedding_name = self._prefix + bare
        self.head_name = f"{spec.names.head}.weight"

    def require_tied(self) -> None:
        """Where both tied matrices are stored they must be equal, or one of them would be lost."""
        checkpoint, pair = self._checkpoint, (self.embedding_name, self.head_name)
        if not set(pair) <= checkpoint.tensors.keys():
            return
        blocks = zip(*(checkpoint.blocks(name) for name in pair), strict=False)
        is_same_shape = checkpoint.shape(pair[0]) == checkpoint.shape(pair[1])
        if not is_same_shape or not all(np.array_equal(a, b) for a, b in blocks):
            raise CheckpointError(
                f"{checkpoint.folder}: {pair[1]} differs from {pair[0]}, though config.json has "
                "tie_word_embeddings true; set it to false if both were trained"
            )

    def require_all_read(self) -> None:
        """A tensor without a place in the graph means another model than the spec describes."""
        ignored = self._spec.names.ignored
        left = {name for name in self._checkpoint.unread if not name.endswith(ignored)}
        if left:
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor '{min(left)}' has no place in a "
                f"{self._spec.architecture} graph ({len(left)} such); config.json does not "
                "describe these weights"
            )

    def embedding(self) -> ir.Value:
        """The table of tokens, [vocab, hidden]."""
        tensors = self._checkpoint.tensors
        # Of two tied matrices a checkpoint may hold either.
        head_only = self.embedding_name not in tensors and self.head_name in tensors
        is_tied_head = head_only and self._spec.tied_embeddings
        name = self.head_name if is_tied_head else self.embedding_name
        return self._join("embed_tokens.weight", self._head_shape, [name])

    def head(self) -> ir.Value:
        """The output head, [vocab, hidden]."""
        return self._join("lm_head.weight", self._head_shape, [self.head_name])

    def positions(self, name: str) -> ir.Value:
        """The table of positions, [positions, hidden]."""
        shape = (self._spec.max_position_embeddings, self._spec.hidden_size)
        return self._join("positions.weight", shape, [f"{self._prefix}{name}.weight"])

    def linear(
        self, name: str, layer: int, part: str, shape: tuple[int, ...], kind: Kind = "weight"
    ) -> ir.Value:
        """The weights [out, in], or the bias [out], of a product that our `part` names."""
        target, sources = f"{name}.{kind}", self._in_layer(layer, part, kind)
        names = self._spec.names
        if names.heads_together and part == "qkv_proj":
            return self._split_heads(target, sources[0], shape)
        if names.transposed and kind == "weight":
            return self._transpose(target, sources[0], shape)
        return self._join(target, shape, sources)

    def norm(self, name: str, source: str, size: int, kind: Kind = "weight") -> ir.Value:
        """The weights or biases of a norm, [size]; `source` is its name below the prefix."""
        found = [f"{self._prefix}{source}.{kind}"]
        plus_one = self._spec.norm.plus_one and kind == "weight"
        return self._join(f"{name}.{kind}", (size,), found, plus_one)

    def head_norms(self, name: str, layer: int, part: str, heads: int, size: int) -> ir.Value:
        """The norms of heads that have weights of their own, [heads, size]."""
        (pattern,) = self._in_layer(layer, part, "weight")
        sources = [pattern.format(h=h) for h in range(heads)]
        shapes = {self._checkpoint.shape(source) for source in sources}
        if shapes != {(size,)}:
            raise self._misfit(sources, (heads, size))
        blocks = chain.from_iterable(self._checkpoint.blocks(source) for source in sources)
        return self._weights.add(f"{name}.weight", ir.DataType.FLOAT, (heads, size), blocks)

    def layer_name(self, layer: int, part: str) -> str:
        """The name of a layer's part below the prefix."""
        return f"{self._spec.names.of('layers').format(i=layer)}.{part}"

    def experts_in(self, name: str, layer: int, experts: Experts) -> ir.Value:
        """Gates and ups, [experts, 2 * size, hidden], their rows taking turns."""
        shape = (experts.size, self._spec.hidden_size)

        def blocks() -> Iterator[Floats]:
            for e in range(experts.count):
                both = np.empty((shape[0], 2, shape[1]), np.float32)
                for place, part in enumerate(("expert_gate", "expert_up")):
                    both[:, place] = self._matrix(layer, part, e, shape)
                yield both

        whole = (experts.count, 2 * shape[0], shape[1])
        return self._weights.add(f"{name}.weight", ir.DataType.FLOAT, whole, blocks())

    def experts_out(self, name: str, layer: int, experts: Experts) -> ir.Value:
        """Downs, [experts, hidden, size]."""
        shape = (self._spec.hidden_size, experts.size)
        blocks = (self._matrix(layer, "expert_down", e, shape) for e in range(experts.count))
        whole = (experts.count, *shape)
        return self._weights.add(f"{name}.weight", ir.DataType.FLOAT, whole, blocks)

    @property
    def _head_shape(self) -> tuple[int, int]:
        return self._spec.vocab_size, self._spec.hidden_size

    def _in_layer(self, layer: int, part: str, kind: Kind) -> list[str]:
        """The checkpoint's names of our `part`."""
        theirs = self._spec.names.of(part).split()
        return [f"{self._prefix}{self.layer_name(layer, name)}.{kind}" for name in theirs]

    def _matrix(self, layer: int, part: str, expert: int, shape: tuple[int, int]) -> Floats:
        (pattern,) = self._in_layer(layer, part, "weight")
        name = pattern.format(e=expert)
        self._require_shape(name, shape)
        return self._checkpoint.matrix(name)

    def _join(
        self, name: str, shape: tuple[int, ...], sources: Sequence[str], plus_one: bool = False
    ) -> ir.Value:
        """Tensors joined along their first axis."""
        shapes = [self._checkpoint.shape(source) for source in sources]
        rows = sum(found[0] for found in shapes if found)
        if any(not found or (rows, *found[1:]) != shape for found in shapes):
            raise self._misfit(sources, shape)
        blocks = chain.from_iterable(self._checkpoint.blocks(source) for source in sources)
        if plus_one:
            blocks = (block + np.float32(1) for block in blocks)
        return self._weights.add(name, ir.DataType.FLOAT, shape, blocks)

    def _transpose(self, name: str, source: str, shape: tuple[int, ...]) -> ir.Value:
        self._require_shape(source, shape[::-1])
        transposed = np.ascontiguousarray(self._checkpoint.matrix(source).T)
        return self._weights.add_array(name, transposed)

    def _split_heads(self, name: str, source: str, shape: tuple[int, ...]) -> ir.Value:
        """[heads, q k v, size] to [q k v, heads, size], rows of any width."""
        self._require_shape(source, shape)
        step = self._spec.attention.head_size * prod(shape[1:])
        starts = (
            (head * 3 + part) * step
            for part in range(3)
            for head in range(self._spec.attention.num_heads)
        )
        parts = (self._checkpoint.blocks(source, start, start + step) for start in starts)
        return self._weights.add(name, ir.DataType.FLOAT, shape, chain.from_iterable(parts))

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._checkpoint.shape(name) != shape:
            raise self._misfit([name], shape)

    def _misfit(self, sources: Sequence[str], shape: tuple[int, ...]) -> CheckpointError:
        found = ", ".join(f"{s} {list(self._checkpoint.shape(s))}" for s in sources)
        return CheckpointError(
            f"{self._checkpoint.folder}: {found}: config.json asks for {list(shape)} in all"
        )
