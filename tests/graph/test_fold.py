"""Smoothing: the same model, with activations that integers hold better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.fold import Smoothing, smoothing_factors
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu
from tests.exact import WEIGHT_BITS
from tests.graph.models import VOCAB, save_model, torch_logits
from tests.graph.running import GraphRunner

TEXTS = [np.random.default_rng(seed).integers(3, VOCAB, 40).tolist() for seed in range(4)]
IDS = np.random.default_rng(9).integers(3, VOCAB, 30).tolist()


@pytest.mark.parametrize(
    ("name", "smoothed"),
    [
        ("llama-tied", 4),
        ("gpt2", 4),
        ("gpt_neox", 4),
        ("cohere2", 2),
        ("gemma2", 4),
        ("mixtral", 2),
    ],
)
def test_without_rounding_nothing_changes(name: str, smoothed: int, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    export, out = tmp_path / "onnx", tmp_path / "out"
    export.mkdir()
    out.mkdir()
    export_decoder(tmp_path, export, Cpu())
    smoothing = Smoothing(Calibration(export, TEXTS), 0.5)
    quantize_graph(export, out, "fp32", None, changes=smoothing)
    before, after = (_norm_weights(folder) for folder in (export, out))
    assert sum(not np.array_equal(before[name], after[name]) for name in before) >= smoothed
    wanted = torch_logits(model, IDS)
    found = GraphRunner(out).prefill(IDS)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def _norm_weights(folder: Path) -> dict[str, NDArray[Any]]:
    graph = onnx.load(folder / "model.onnx").graph
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if len(tensor.dims) == 1 and tensor.name.endswith(".weight")
    }


def test_a_model_with_loud_channels_keeps_its_logits(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.endswith("layernorm.weight"):
            weights[name][:3] *= 300
    for name, matrix in weights.items():
        if name.endswith(
            (
                "q_proj.weight",
                "k_proj.weight",
                "v_proj.weight",
                "gate_proj.weight",
                "up_proj.weight",
            )
        ):
            matrix[:, :3] /= 300
    save_file(weights, file)
    export = tmp_path / "onnx"
    export.mkdir()
    export_decoder(tmp_path, export, Cpu())
    wanted = GraphRunner(export).prefill(IDS)
    errors: list[float] = []
    for strength in (None, 0.5):
        out = tmp_path / str(strength)
        out.mkdir()
        smoothing = strength and Smoothing(Calibration(export, TEXTS), strength)
        quantize_graph(
            export, out, "int8-rowwise", Int8Rowwise(WEIGHT_BITS), changes=smoothing or None
        )
        found = GraphRunner(out).prefill(IDS)
        errors.append(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
    assert errors[1] < 0.05 < 4 * errors[1] < errors[0]


@given(st.floats(0.05, 1), st.integers(0, 2**32 - 1))
def test_factors_are_those_of_the_paper(strength: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, w = np.exp(random.uniform(-5, 5, (2, 9))).astype(np.float32)
    x[0] = w[1] = 0
    factors = smoothing_factors(x, w, strength)
    assert factors[0] == factors[1] == 1
    for j in range(2, 9):
        wanted = float(x[j]) ** strength / float(w[j]) ** (1 - strength)
        assert factors[j] == pytest.approx(wanted, rel=1e-4)
