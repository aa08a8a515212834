"""The least that runs a decoder graph: the inputs of the contract, fed by hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lifecycle.engines.decoder import GRAPH, DecoderInfo
from lifecycle.engines.ort_session import CACHE_TYPES
from tests.graph.models import VOCAB, torch_logits


class GraphRunner:
    """`slots` sequences of up to `capacity` tokens over one exported folder; those in `long` hold
    texts beyond the model's first context."""

    def __init__(
        self, folder: Path, slots: int = 1, capacity: int = 64, long: Collection[int] = ()
    ) -> None:
        info = DecoderInfo.load(folder)
        self.offsets = [info.max_position_embeddings * (b in long) for b in range(slots)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        self.session = ort.InferenceSession(
            folder / GRAPH, options, providers=["CPUExecutionProvider"]
        )
        shape = (slots, info.num_kv_heads, capacity, info.cache_width)
        dtype = CACHE_TYPES[info.kv_dtype]
        self.layers = info.num_layers
        self.cache = [np.zeros(shape, dtype) for _ in range(2 * info.num_layers)]
        self.lengths = [0] * slots
        self.takes_positions = "position_ids" in {i.name for i in self.session.get_inputs()}

    def step(self, new: Mapping[int, Sequence[int]]) -> dict[int, NDArray[np.float32]]:
        """Feed `new` tokens by slot; the logits after each of them, [len, vocab], by slot."""
        slots = range(len(self.lengths))
        counts = [len(new.get(b, ())) for b in slots]
        starts = np.cumsum([0, *counts])
        widest = max(2, *counts)
        columns = np.arange(widest)
        valid = columns < np.array(counts)[:, None]
        pad = np.where(valid, starts[:-1, None] + columns, 0)
        positions = [self.offsets[b] + self.lengths[b] + j for b in slots for j in range(counts[b])]
        ids = [token for b in slots for token in new.get(b, ())]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array(ids, np.int64),
            "pad_index": pad.astype(np.int64),
            "unpad_index": np.argwhere(valid),
            "logit_index": np.arange(len(ids), dtype=np.int64),
            "seqlens_k": np.maximum(np.array(self.lengths) - 1, 0).astype(np.int32),
            "query_seqlens": np.array(counts, np.int32),
            "total_sequence_length": np.array([self.cache[0].shape[2]], np.int32),
        }
        if self.takes_positions:
            feeds["position_ids"] = np.array(positions, np.int64)[:, None]
        logits = self._run(feeds)
        return {b: logits[starts[b] : starts[b + 1]] for b in slots if counts[b]}

    def _run(self, feeds: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float32]:
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for i in range(2 * self.layers):
            part = f"{i // 2}.{('key', 'value')[i % 2]}"
            memory = ort.OrtValue.ortvalue_from_numpy(self.cache[i])
            binding.bind_ortvalue_input(f"past_key_values.{part}", memory)
            binding.bind_ortvalue_output(f"present.{part}", memory)
        self.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each of `ids`, in one step of slot 0."""
        return self.step({0: ids})[0]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after `prompt`, one at a time."""
        found = [int(self.prefill(prompt)[-1].argmax())]
        while len(found) < count:
            found.append(int(self.prefill(found[-1:])[-1].argmax()))
        return found


def relative_errors(model: PreTrainedModel, folder: Path, count: int) -> NDArray[np.float32]:
    """How far the logits of a graph are from those of the model it came from, after each token of `count` random texts."""
    rng = np.random.default_rng(0)
    errors: list[NDArray[np.float32]] = []
    for _ in range(count):
        ids = rng.integers(3, VOCAB, 30).tolist()
        wanted, found = torch_logits(model, ids), GraphRunner(folder).prefill(ids)
        errors.append(np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1))
    return np.concatenate(errors)
