"""What a matrix costs is what PyTorch says it costs, and budgets hold for what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lifecycle.errors import StageError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.gptq import Gptq
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.mixed import Cost, Measured, measure, within_bits, within_kl
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.rewrite import GraphRewrite
from lifecycle.graph.rounding import Grid, least_squares, quantize
from lifecycle.graph.sensitivity import divergences
from lifecycle.graph.targets import Cpu
from tests.graph.models import VOCAB, save_model

TEXTS = [np.random.default_rng(3).integers(3, VOCAB, length).tolist() for length in (30, 7, 19)]
FINE = Int8Rowwise(8)


def exported(name: str, folder: Path, factor: float = 1) -> Path:
    """The graph of a model whose first output of attention is multiplied."""
    model = save_model(name, folder)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(factor)
    model.save_pretrained(folder)
    out = folder / "onnx"
    out.mkdir()
    export_decoder(folder, out, Cpu())
    return out


@pytest.mark.parametrize(
    ("model_name", "matrix", "parameter"),
    [
        ("llama", "layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("llama", "layers.1.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
        ("llama", "lm_head", "lm_head"),
        ("llama", "embed_tokens", "model.embed_tokens"),
        ("llama-tied", "lm_head", "model.embed_tokens"),
    ],
)
def test_costs_are_those_of_pytorch(
    model_name: str, matrix: str, parameter: str, tmp_path: Path
) -> None:
    model = save_model(model_name, tmp_path / "hf")
    out = tmp_path / "onnx"
    out.mkdir()
    export_decoder(tmp_path / "hf", out, Cpu())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    measured = measure(out, scratch, TEXTS, Blockwise(16), FINE, {})
    found = {cost.name: cost.kl for cost in measured.costs}

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            logits = [model(torch.tensor([text])).logits[0] for text in TEXTS]
        return torch.log_softmax(torch.cat(logits).double(), -1)

    before = predictions()
    weight = model.get_parameter(f"{parameter}.weight")
    rows = weight.detach().numpy()
    grid = Grid(16).fitting([Grid(16).largest(rows)])
    rounded = quantize(rows, grid, least_squares).floats(weight.shape[1])
    with torch.no_grad():
        weight.copy_(torch.from_numpy(rounded))
    wanted = (before.exp() * (before - predictions())).sum(-1).mean()
    np.testing.assert_allclose(found[matrix], float(wanted), rtol=1e-2)


def test_costs_are_those_of_the_rounding_that_is_used(tmp_path: Path) -> None:
    source = exported("llama", tmp_path)
    scratches = [tmp_path / "scratch", tmp_path / "scratch2"]
    for scratch in scratches:
        scratch.mkdir()

    def fresh() -> Gptq:
        return Gptq(16, calibration=Calibration(source, TEXTS))

    measured = measure(source, scratches[0], TEXTS, fresh(), FINE, {})
    plain = measure(source, scratches[1], TEXTS, Blockwise(16), FINE, {})
    name = "layers.1.mlp.down_proj"
    rewrite, scheme = GraphRewrite(source), fresh()
    linear = next(linear for linear in rewrite.linears() if linear.name == name)
    rounded = scheme.rounded_product(rewrite, linear).floats(linear.shape[1])
    weight = str(linear.weight.name)
    wanted = divergences(source, TEXTS, VOCAB, {weight: lambda: rounded})[weight]
    kl, by_itself = ({cost.name: cost.kl for cost in m.costs} for m in (measured, plain))
    assert kl[name] == pytest.approx(wanted, rel=1e-4)
    assert kl[name] < by_itself[name]
    # Tokens that are looked up have no moments.
    assert kl["embed_tokens"] == by_itself["embed_tokens"]


@pytest.mark.parametrize("factor", [1, 1e-6])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-narrow", "mixtral"])
def test_planned_bytes_are_those_that_are_written(
    name: str, symmetric: bool, factor: float, tmp_path: Path
) -> None:
    """`factor` makes the scales of one matrix too small for 16 bits."""
    source, coarse = exported(name, tmp_path, factor), Blockwise(16, symmetric=symmetric)
    for part in ("scratch", "out"):
        (tmp_path / part).mkdir()
    measured = measure(source, tmp_path / "scratch", TEXTS, coarse, FINE, {})
    fine = measured.costs[::2]
    exceptions = dict.fromkeys((cost.name for cost in fine), FINE)
    made = quantize_graph(source, tmp_path / "out", "mixed", coarse, exceptions)
    planned = measured.least + sum(cost.saved for cost in fine)
    assert made.bits_per_weight == round(8 * planned / measured.elements, 3)


def test_what_gains_most_per_byte_comes_first() -> None:
    costs = (Cost("a", 0.04, 100), Cost("b", 0.03, 10), Cost("c", 0.01, 50), Cost("d", 0, 10))
    measured = Measured(costs, elements=1000, least=500)

    def names(chosen: list[Cost]) -> str:
        return "".join(cost.name for cost in chosen)

    assert names(within_bits(measured, 4.0)) == ""
    assert names(within_bits(measured, 4.08)) == "b"
    assert names(within_bits(measured, 4.5)) == "bc"
    assert names(within_bits(measured, 8)) == "bacd"
    assert names(within_kl(measured, 1)) == ""
    assert names(within_kl(measured, 0.06)) == "b"
    assert names(within_kl(measured, 0.02)) == "ba"
    measured = Measured((*costs, Cost("e", 0, -40)), elements=1000, least=540)
    assert names(within_bits(measured, 4.08)) == "eb"
    assert names(within_kl(measured, 1)) == "e"
    with pytest.raises(StageError, match=r"3\.9 bits per weight are fewer than the 4\.000"):
        within_bits(measured, 3.9)


def test_a_budget_that_nothing_holds_is_refused_before_the_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("llama", tmp_path)
    monkeypatch.setattr("lifecycle.graph.mixed.divergences", lambda *_: pytest.fail("measured"))
    with pytest.raises(StageError, match=r"2 bits per weight are fewer than the"):
        measure(source, tmp_path, TEXTS, Blockwise(16), FINE, {}, bits=2)
