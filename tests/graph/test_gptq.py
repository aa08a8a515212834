"""Calibration sees what PyTorch sees; GPTQ rounds for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lifecycle.errors import StageError
from lifecycle.graph import gptq
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration, Inputs
from lifecycle.graph.export import export_decoder
from lifecycle.graph.gptq import Gptq
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.rounding import Grid, least_squares, quantize
from lifecycle.graph.targets import Cpu
from tests.graph.models import MODELS, VOCAB, save_model
from tests.graph.running import GraphRunner
from tests.graph.test_quantize import mean_loss, quantized, sample_texts

Floats = NDArray[np.float32]
RANDOM = np.random.default_rng(5)
TEXTS = [RANDOM.integers(3, VOCAB, length).tolist() for length in (30, 7, 19, 1)]


def exported(name: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    model = save_model(name, folder)
    out = folder / "onnx"
    out.mkdir()
    export_decoder(folder, out, Cpu())
    return model, out


def read_in_torch(model: PreTrainedModel, module: str) -> Floats:
    """What a module reads on `TEXTS`, [tokens, in]."""
    read: list[torch.Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].flatten(0, -2))
    )
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([text]))
    hook.remove()
    return torch.cat(read).numpy()


def mean_product(left: Floats, right: Floats) -> Floats:
    return left.T @ right / np.float32(len(right))


def seen_by_torch(model: PreTrainedModel, module: str) -> Floats:
    """The moments of what a module reads on `TEXTS`."""
    rows = read_in_torch(model, module)
    return mean_product(rows, rows)


def test_moments_are_those_of_pytorch(tmp_path: Path) -> None:
    model, out = exported("llama", tmp_path)
    calibration = Calibration(out, TEXTS)
    for i in range(2):
        for ours, theirs in (
            ("self_attn.qkv_proj", "self_attn.q_proj"),
            ("self_attn.o_proj", "self_attn.o_proj"),
            ("mlp.gate_up_proj", "mlp.gate_proj"),
            ("mlp.down_proj", "mlp.down_proj"),
        ):
            found = calibration.second_moments(f"layers.{i}.{ours}")
            wanted = seen_by_torch(model, f"model.layers.{i}.{theirs}")
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * wanted.max())
    found = calibration.second_moments("lm_head")
    np.testing.assert_allclose(found, seen_by_torch(model, "lm_head"), rtol=1e-3, atol=1e-3)


def test_a_layer_reads_what_the_replaced_one_before_it_gives(tmp_path: Path) -> None:
    model, out = exported("llama", tmp_path)
    calibration = Calibration(out, TEXTS)
    calibration.second_moments("layers.0.mlp.down_proj")
    other = RANDOM.standard_normal((64, 96)).astype(np.float32) * 0.2
    calibration.replace("layers.0.mlp.down_proj", other)
    found = calibration.second_moments("layers.1.self_attn.qkv_proj")
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        weight.copy_(torch.from_numpy(other))
    wanted = seen_by_torch(model, "model.layers.1.self_attn.q_proj")
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_inputs_are_known_with_and_without_what_was_replaced(tmp_path: Path) -> None:
    model, out = exported("llama", tmp_path)
    calibration = Calibration(out, TEXTS)
    assert calibration.inputs("layers.0.self_attn.qkv_proj") is None
    modules = ("self_attn.o_proj", "mlp.down_proj")
    # A norm reads what the output of these two is added to, and no module reads it by itself.
    beside = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.0.{name}" for name in (*modules, *beside)]
    exact = {name: read_in_torch(model, name) for name in names}
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    other = (weight.detach().numpy() * 1.3).astype(np.float32)
    calibration.replace("layers.0.self_attn.o_proj", other)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(other))
    found = calibration.inputs("layers.0.mlp.down_proj")
    assert found is not None and found.missed_beside is not None
    now = {name: read_in_torch(model, name) for name in names}
    rows, missed = (a["model.layers.0.mlp.down_proj"] for a in (now, exact))
    stream = "model.layers.0.post_attention_layernorm"
    for ours, left in (
        (found.moments, rows),
        (found.missed, missed - rows),
        (found.missed_beside, exact[stream] - now[stream]),
    ):
        wanted = mean_product(left, rows)
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_weights_make_up_for_errors_of_their_inputs() -> None:
    inputs, beside, noise, weights = (
        RANDOM.standard_normal(shape).astype(np.float32)
        for shape in ((500, 24), (500, 8), (500, 24), (8, 24))
    )
    noisy = (0.9 * inputs + 0.02 * noise).astype(np.float32)
    lacking = (0.2 * noisy[:, :8]).astype(np.float32)

    found = Inputs(
        mean_product(noisy, noisy),
        mean_product((inputs - noisy).astype(np.float32), noisy),
        mean_product(lacking, noisy),
    )
    made = gptq.compensating(weights, found)
    wanted = inputs @ weights.T + beside
    errors = [np.linalg.norm(wanted - (beside - lacking) - noisy @ w.T) for w in (made, weights)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"qwen3_moe-odd"}))
def test_every_architecture_is_walked(name: str, tmp_path: Path) -> None:
    _, out = exported(name, tmp_path)
    made = quantized(out, tmp_path / "int4", Gptq(16, calibration=Calibration(out, TEXTS)))
    assert np.isfinite(GraphRunner(made).prefill(TEXTS[0])).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_a_product_gives_changes_less_than_by_plain_rounding(symmetric: bool) -> None:
    mixing = RANDOM.standard_normal((128, 128)) * np.geomspace(1, 0.01, 128)
    inputs = (RANDOM.standard_normal((2000, 128)) @ mixing).astype(np.float32)
    weights = RANDOM.standard_normal((32, 128)).astype(np.float32)

    grid = Grid(32, symmetric=symmetric)
    moments = inputs.T @ inputs / np.float32(len(inputs))
    plain = quantize(weights, grid, least_squares)
    own = gptq.quantize(weights, moments, grid, least_squares)
    changes = [np.linalg.norm(inputs @ (b.floats(128) - weights).T) for b in (own, plain)]
    assert own.integers.max() <= 15
    assert changes[0] < 0.75 * changes[1]


@pytest.mark.parametrize("moments", [np.zeros((40, 40)), np.ones((40, 40)), np.eye(40) * 1e12])
def test_inputs_that_say_little_are_no_trouble(moments: Floats) -> None:
    weights = RANDOM.standard_normal((4, 40)).astype(np.float32)
    found = gptq.quantize(weights, moments.astype(np.float32), Grid(32), least_squares)
    assert found.integers.shape == (4, 2, 32) and found.scales.shape == (4, 2)
    assert np.isfinite(found.scales).all()
    assert not found.floats(64)[:, 40:].any()


def test_real_weights_lose_less_than_by_plain_rounding(stories: Path, tmp_path: Path) -> None:
    texts, calibration = np.split(sample_texts(stories, slots=24, count=200), [8])
    before = mean_loss(stories, texts)
    head = {"lm_head": Int8Rowwise(8)}
    plain = quantized(stories, tmp_path / "rtn", Blockwise(32), head)
    scheme = Gptq(32, calibration=Calibration(stories, calibration.tolist()))
    rounded = quantized(stories, tmp_path / "gptq", scheme, head)
    assert mean_loss(rounded, texts) - before < 0.6 * (mean_loss(plain, texts) - before)


@pytest.mark.parametrize("texts", [[], [[]], [[5] * 129]])
def test_texts_that_do_not_fit_are_refused(texts: list[list[int]], tmp_path: Path) -> None:
    _, out = exported("llama", tmp_path)
    with pytest.raises(StageError, match="calibration texts of up to"):
        Calibration(out, texts)


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e10)
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1e38)
    model.save_pretrained(tmp_path)
    out = tmp_path / "onnx"
    out.mkdir()
    export_decoder(tmp_path, out, Cpu())
    with pytest.raises(StageError, match="layers.1.self_attn.qkv_proj reads .* is not finite"):
        Calibration(out, TEXTS).second_moments("layers.1.self_attn.qkv_proj")
