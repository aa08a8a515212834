"""Ways to quantise that read texts hold one layer and what it makes of one batch, whatever the model and the texts."""

from __future__ import annotations

import os
import resource
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.gptq import Gptq
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.pieces import Pieces
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.scratch import mapped
from lifecycle.graph.sensitivity import divergences
from lifecycle.graph.targets import Cpu
from tests.graph.models import SHAPE

HIDDEN, INNER, VOCAB = 128, 128, 4096
LAYER = 4 * HIDDEN * (3 * HIDDEN + 3 * INNER)
"""Bytes of the matrices of a layer, which has half as many heads of keys and values as of queries."""
BATCH = 4096
"""Tokens that run together."""


def exported(folder: Path, changes: Mapping[str, Any]) -> Path:
    """The graph of a Llama with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB}
    config = AutoConfig.for_model("llama", **SHAPE | sizes | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    out = folder / "onnx"
    out.mkdir()
    export_decoder(folder / "hf", out, Cpu())
    return out


def texts(count: int) -> list[list[int]]:
    """Of the greatest length."""
    return np.random.default_rng(1).integers(3, VOCAB, (count, 128)).tolist()


def peak(call: Callable[[], object]) -> int:
    """The most bytes that Python and numpy hold at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_gptq_takes_no_more_for_more_layers(tmp_path: Path) -> None:
    def run(layers: int) -> int:
        folder = tmp_path / str(layers)
        source = exported(folder, {"num_hidden_layers": layers})
        out = folder / "out"
        out.mkdir()

        def quantize() -> None:
            scheme = Gptq(32, calibration=Calibration(source, texts(2), folder))
            head = dict.fromkeys(("lm_head", "embed_tokens"), Int8Rowwise(7))
            quantize_graph(source, out, "int4", scheme, head)

        return peak(quantize)

    # What is imported by the first call must not count for one of them.
    run(1)
    assert run(3) - run(2) < LAYER / 2


def test_activations_between_pieces_lie_in_files(tmp_path: Path) -> None:
    source, scratch = exported(tmp_path, {}), tmp_path / "scratch"
    scratch.mkdir()
    pieces = Pieces(source, texts(BATCH // 128 + 1), scratch=scratch)
    large, small = pieces.batches
    for piece in range(3):
        outputs = pieces.handed_on(piece)
        session = pieces.session(piece, outputs, {})
        before = large.live
        for batch in (large, small):
            batch.live = pieces.step(session, piece, batch, batch.live)
        found = pieces.run(session, large, outputs, before)
        assert {type(large.live[name]) for name in outputs} == {np.memmap}
        assert {type(small.live[name]) for name in outputs} == {np.ndarray}
        for name, value in found.items():
            np.testing.assert_array_equal(large.live[name], value)
    assert not list(scratch.iterdir())


def test_logits_of_all_texts_are_not_held(tmp_path: Path) -> None:
    source, some = exported(tmp_path, {}), texts(8)
    weights = np.zeros((HIDDEN, INNER), np.float32)
    change = {"layers.1.mlp.down_proj.weight": lambda: weights}
    logits = 4 * VOCAB * sum(map(len, some))
    assert peak(lambda: divergences(source, some, VOCAB, change, tmp_path)) < logits / 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits of open files are the system's")
def test_where_no_file_can_be_opened_any_more_values_are_in_memory(tmp_path: Path) -> None:
    wanted = np.arange(3000, dtype=np.float32).reshape(30, 100)
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), list[int]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        os.close(opened.pop())
        found = mapped([wanted[:10], wanted[10:]], wanted.shape, wanted.dtype, tmp_path)
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, wanted)
