"""Experts are rounded for the tokens that visit them, and lose less than by plain rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lifecycle.graph.awq import scale_channels
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.gptq import Gptq, expert_moments
from lifecycle.graph.quantize import Scheme
from lifecycle.graph.rewrite import GraphRewrite
from lifecycle.graph.routing import gated
from lifecycle.graph.targets import Cpu
from tests.graph.models import VOCAB, save_model
from tests.graph.running import GraphRunner
from tests.graph.test_quantize import quantized

RANDOM = np.random.default_rng(7)
TEXTS = [RANDOM.integers(3, VOCAB, length).tolist() for length in (30, 7, 19)]
ONLY_EXPERTS: Mapping[str, Scheme | None] = dict.fromkeys(("*_proj", "lm_head", "embed_tokens"))


def exported(model: PreTrainedModel, folder: Path) -> Path:
    out = folder / "onnx"
    out.mkdir()
    model.save_pretrained(folder)
    export_decoder(folder, out, Cpu())
    return out


def with_uneven_channels(name: str, folder: Path) -> PreTrainedModel:
    """A random mixture of which some channels are much larger than others, as in trained models."""
    model = save_model(name, folder)
    with torch.no_grad():
        table = model.get_parameter("model.embed_tokens.weight")
        table.copy_(torch.randn_like(table))
        sizes = torch.exp(1.5 * torch.randn(64))
        for layer in ("model.layers.0", "model.layers.1"):
            model.get_parameter(f"{layer}.self_attn.o_proj.weight").mul_(0.1)
            model.get_parameter(f"{layer}.post_attention_layernorm.weight").mul_(sizes)
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe-mixed"])
def test_visits_make_what_pytorch_makes(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    out = exported(model, tmp_path)
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = model.get_submodule("model.layers.1.mlp.experts").register_forward_hook(
        lambda _, inputs, output: seen.append((*inputs, output))
    )
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([text]))
    hook.remove()
    read, picked, _, wanted = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))

    mixture = GraphRewrite(out).mixtures()[-1]
    routed = Calibration(out, TEXTS).routed(mixture.name)
    made = np.zeros_like(wanted)
    for expert in range(mixture.num_experts):
        visits = routed.visits(expert)
        tokens = np.flatnonzero((picked == expert).any(axis=1))
        np.testing.assert_allclose(visits.rows, read[tokens], rtol=1e-3, atol=1e-4)
        inner = gated(visits.rows, GraphRewrite(out).expert(mixture.gate_up, expert))
        weights = GraphRewrite(out).expert(mixture.down, expert)
        made[tokens] += visits.shares * (inner @ weights.T)
    np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(("method", "most"), [("gptq", 0.4), ("awq", 0.8)])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_predictions_change_less_than_by_plain_rounding(
    name: str, method: str, most: float, tmp_path: Path
) -> None:
    source = exported(with_uneven_channels(name, tmp_path), tmp_path)
    texts = np.random.default_rng(1).integers(3, VOCAB, (40, 40))
    calibration, held_out = (part.tolist() for part in np.split(texts, [32]))
    plain = quantized(source, tmp_path / "rtn", Blockwise(16), ONLY_EXPERTS)
    made = rounded(source, tmp_path, method, calibration)
    wanted = log_softmax(source, held_out)
    # Of the median token: a few pick another expert, and tell of nothing else.
    found, bound = (
        (wanted.exp() * (wanted - log_softmax(folder, held_out))).sum(-1).median()
        for folder in (made, plain)
    )
    assert found < most * bound


def rounded(source: Path, folder: Path, method: str, texts: list[list[int]]) -> Path:
    """The experts alone in 4 bits."""
    walk, out = Calibration(source, texts), folder / method
    if method == "gptq":
        return quantized(source, out, Gptq(16, calibration=walk), ONLY_EXPERTS)
    (folder / "scaled").mkdir()
    scale_channels(source, folder / "scaled", walk, Blockwise(16), ONLY_EXPERTS)
    return quantized(folder / "scaled", out, Blockwise(16), ONLY_EXPERTS)


def log_softmax(folder: Path, texts: list[list[int]]) -> torch.Tensor:
    logits = np.concatenate([GraphRunner(folder).prefill(text) for text in texts])
    return torch.log_softmax(torch.from_numpy(logits), -1)


DOWN = "layers.0.mlp.experts.down_proj"


def test_experts_that_no_token_visits_are_rounded_plainly(tmp_path: Path) -> None:
    source = exported(save_model("mixtral", tmp_path), tmp_path)
    made = rounded(source, tmp_path, "gptq", [[5]])
    plain = quantized(source, tmp_path / "rtn", Blockwise(16), ONLY_EXPERTS)
    for part in (DOWN, "layers.0.mlp.experts.gate_up_proj"):
        ours, theirs = (stored(folder, f"{part}.int4") for folder in (made, plain))
        assert unchanged(ours, theirs) == unvisited(source)


def test_experts_that_no_token_visits_have_no_scales(tmp_path: Path) -> None:
    source = exported(save_model("mixtral", tmp_path), tmp_path)
    rounded(source, tmp_path, "awq", [[5]])
    ours, theirs = (stored(folder, f"{DOWN}.weight") for folder in (tmp_path / "scaled", source))
    assert unchanged(ours, theirs) == unvisited(source)


def unvisited(source: Path) -> list[bool]:
    """Those of four experts to which the first layer hands no token, of one."""
    counts = Calibration(source, [[5]]).routed("layers.0.mlp.experts").counts()
    assert sorted(counts) == [0, 0, 1, 1]
    return (counts == 0).tolist()


def unchanged(left: NDArray[Any], right: NDArray[Any]) -> list[bool]:
    return [np.array_equal(*pair) for pair in zip(left, right, strict=True)]


def stored(folder: Path, name: str) -> NDArray[Any]:
    graph = onnx.load(folder / "model.onnx").graph
    return onnx.numpy_helper.to_array(next(t for t in graph.initializer if t.name == name))


def test_what_few_tokens_say_of_two_channels_counts_less() -> None:
    rows = RANDOM.standard_normal((12, 6)).astype(np.float32)
    shares = RANDOM.uniform(0.1, 1, (12, 1)).astype(np.float32)
    wanted = (rows * shares).T @ (rows * shares) / 12
    once, often = (
        expert_moments(np.tile(rows, (n, 1)), np.tile(shares, (n, 1))) for n in (1, 1000)
    )
    np.testing.assert_allclose(often, wanted, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(np.diag(once), np.diag(wanted), rtol=1e-5)
    # Twice as many tokens as channels count half.
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(once[off], wanted[off] / 2, rtol=1e-4, atol=1e-6)


def test_a_walk_knows_how_many_tokens_came(tmp_path: Path) -> None:
    source = exported(save_model("qwen3_moe-mixed", tmp_path), tmp_path)
    walk = Calibration(source, TEXTS)
    quantized(source, tmp_path / "out", Gptq(16, calibration=walk))
    assert walk.visits.keys() == {"layers.1.mlp.experts"}
    assert sum(walk.visits["layers.1.mlp.experts"]) == 2 * sum(map(len, TEXTS))
