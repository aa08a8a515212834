"""Checkpoints in every layout become the same weights; what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lifecycle.errors import CheckpointError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.graph.models import save_model, torch_logits
from tests.graph.running import GraphRunner

Tensors = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Put other tensors into a saved checkpoint."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


def export(folder: Path) -> Path:
    """Export a saved checkpoint; the folder of the graph."""
    out = folder / "onnx"
    out.mkdir()
    export_decoder(folder, out, Cpu())
    return out


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_a_checkpoint_may_leave_out_the_prefix(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    prefixes = ("transformer.", "gpt_neox.", "model.")

    def without(tensors: Tensors) -> Tensors:
        return {
            k.removeprefix(next(filter(k.startswith, prefixes), "")): v for k, v in tensors.items()
        }

    edit(tmp_path, without)
    found = GraphRunner(export(tmp_path)).prefill([5, 6, 7])
    assert np.abs(found - torch_logits(model, [5, 6, 7])).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "left_over"),
    [("gpt2", "transformer.h.0.attn.bias"), ("gpt_neox", "gpt_neox.layers.1.attention.bias")],
)
def test_masks_in_old_checkpoints_are_no_weights(name: str, left_over: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    edit(tmp_path, lambda tensors: {**tensors, left_over: torch.ones(1, 1, 4, 4)})
    export(tmp_path)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    save_model("gpt2", tmp_path)
    edit(tmp_path, lambda tensors: {**tensors, "transformer.h.0.extra.bias": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"extra\.bias' has no place in a gpt2 graph"):
        export(tmp_path)


@pytest.mark.parametrize(
    ("name", "field", "value", "named"),
    [
        ("llama", "intermediate_size", 95, r"gate_proj\.weight \[96, 64\], .*asks for \[190, 64\]"),
        ("gpt2", "n_inner", 95, r"c_fc\.weight \[64, 256\]: .*asks for \[64, 95\]|asks for"),
        ("gpt_neox", "num_attention_heads", 8, "no tensor|asks for"),
        ("mixtral", "intermediate_size", 95, r"experts\.0\.w1\.weight \[96, 64\].*\[95, 64\]"),
        ("stablelm-parallel", "num_attention_heads", 2, "asks for"),
    ],
)
def test_sources_of_another_shape_are_named(
    name: str, field: str, value: int, named: str, tmp_path: Path
) -> None:
    save_model(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=named):
        export(tmp_path)


def test_weights_of_experts_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

    def damaged(tensors: Tensors) -> Tensors:
        tensors[name][3, 4] = float("nan")
        return tensors

    edit(tmp_path, damaged)
    with pytest.raises(CheckpointError, match=rf"{name} holds values that are not finite"):
        export(tmp_path)
