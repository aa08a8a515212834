"""Weights in 16 bits: the nearest numbers, computed with in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lifecycle.engines.decoder import GRAPH, WEIGHTS
from lifecycle.errors import StageError
from lifecycle.graph.half import Half
from tests.graph.models import (
    VOCAB,
    export_quantized,
    replace_matrices,
    save_model,
    torch_logits,
)
from tests.graph.running import GraphRunner

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "phi3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("form", ["fp16", "bf16"])
def test_logits_are_those_of_the_rounded_weights(
    form: Literal["fp16", "bf16"], name: str, tmp_path: Path
) -> None:
    model = save_model(name, tmp_path)
    out = export_quantized(tmp_path, Half(form))

    def round_trip(weights: NDArray[np.float32]) -> NDArray[np.float32]:
        return torch.from_numpy(weights).to(DTYPES[form]).float().numpy()

    ids = np.random.default_rng(0).integers(3, VOCAB, 30).tolist()
    plain = torch_logits(model, ids)
    replace_matrices(model, round_trip)
    if name == "gpt2":
        # Its table of positions stays in float32.
        weights = load_file(tmp_path / "model.safetensors")["transformer.wpe.weight"]
        model.transformer.wpe.weight.data.copy_(weights)
    wanted = torch_logits(model, ids)
    found = GraphRunner(out).prefill(ids)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(plain - wanted).max() > 3e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("form", ["fp16", "bf16"])
def test_every_matrix_takes_half_the_bytes_and_a_tied_one_is_stored_once(
    form: Literal["fp16", "bf16"], tmp_path: Path
) -> None:
    save_model("llama-tied", tmp_path)
    out = export_quantized(tmp_path, Half(form))
    stored = ir.load(out / GRAPH).graph.initializers.values()
    types = {str(v.dtype) for v in stored if v.shape is not None and len(v.shape) == 2}
    assert types == {"FLOAT16" if form == "fp16" else "BFLOAT16", "FLOAT"}
    before = (tmp_path / "fp32" / WEIGHTS).stat().st_size
    assert (out / WEIGHTS).stat().st_size < 0.56 * before


def test_a_weight_beyond_fp16_is_refused_by_name(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights: dict[str, Any] = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = -70_000.0
    save_file(weights, file)
    named = r"layers\.1\.mlp\.down_proj.* holds 70000, and fp16 reaches only to 65504; take .*bf16"
    with pytest.raises(StageError, match=named):
        export_quantized(tmp_path, Half("fp16"))
