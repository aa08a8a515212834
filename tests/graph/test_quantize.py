"""Which matrices get which scheme, and what a real model keeps of its quality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.errors import StageError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.check import check_graph
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu
from lifecycle.pipeline.artifact import hash_tree
from lifecycle.pipeline.registry import ARCHITECTURES, names
from tests.exact import WEIGHT_BITS
from tests.graph.models import MODELS, export_quantized, save_model
from tests.graph.running import GraphRunner, relative_errors

INT8 = Int8Rowwise(7)
EXAMPLES = {model_type: name for name, (model_type, _) in reversed(MODELS.items())}
"""Each architecture -> the first model of it."""


def operators(folder: Path) -> dict[str, str]:
    """The operator of each node by name."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {node.name: node.op_type for node in graph.node}


def quantized(
    source: Path, out: Path, scheme: Scheme, exceptions: Mapping[str, Scheme | None] | None = None
) -> Path:
    out.mkdir(exist_ok=True)
    quantize_graph(source, out, "test", scheme, exceptions)
    check_graph(out)
    return out


def test_every_matrix_is_replaced(tiny: Path, tmp_path: Path) -> None:
    made = quantize_graph(tiny, tmp_path, "int8-rowwise", INT8)
    assert "Gemm" not in operators(tmp_path).values()
    assert made.bytes == (tmp_path / "model.onnx.data").stat().st_size
    assert 8 < made.bits_per_weight < 9
    assert DecoderInfo.load(tmp_path).scheme == "int8-rowwise"


@pytest.mark.parametrize("scheme", [INT8, Blockwise()])
def test_the_same_graph_gives_the_same_bytes(scheme: Scheme, tiny: Path, tmp_path: Path) -> None:
    one, two = (quantized(tiny, tmp_path / name, scheme) for name in ("one", "two"))
    assert hash_tree(one) == hash_tree(two)


def test_exceptions_pick_other_schemes(tiny: Path, tmp_path: Path) -> None:
    exceptions = {"layers.0.mlp.*": None, "*.o_proj": INT8}
    found = operators(quantized(tiny, tmp_path, Blockwise(), exceptions))
    assert found["layers.0.mlp.down_proj"] == "Gemm"
    assert found["layers.1.mlp.down_proj.product"] == "MatMulNBits"
    assert found["layers.0.self_attn.o_proj.product"] == "MatMulIntegerToFloat"
    assert found["lm_head.product"] == "MatMulNBits"


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_matrix_has_one_form(name: str, tiny: Path, tmp_path: Path) -> None:
    kept = operators(quantized(tiny, tmp_path / "kept", INT8, {name: None}))
    assert (kept["lm_head"], kept["embed_tokens"]) == ("Gemm", "Gather")
    moved = operators(quantized(tiny, tmp_path / "moved", Blockwise(), {name: INT8}))
    assert moved["lm_head.product"] == "MatMulIntegerToFloat"
    assert "GatherBlockQuantized" not in moved.values()


def test_skipping_all_changes_no_number(tiny: Path, tmp_path: Path) -> None:
    out = quantized(tiny, tmp_path, INT8, {"*": None})
    assert np.array_equal(GraphRunner(out).prefill([5, 6]), GraphRunner(tiny).prefill([5, 6]))


@pytest.mark.parametrize("scheme", [Int8Rowwise(WEIGHT_BITS), Blockwise(16)])
@pytest.mark.parametrize("architecture", names(ARCHITECTURES))
def test_every_architecture_is_quantized(architecture: str, scheme: Scheme, tmp_path: Path) -> None:
    model = save_model(EXAMPLES[architecture], tmp_path)
    out = export_quantized(tmp_path, scheme)
    left = {name for name, op in operators(out).items() if op in ("Gemm", "MoE")}
    assert all(name.endswith(".router") for name in left)
    bound = {7: 0.07, 8: 0.05}[scheme.weight_bits] if isinstance(scheme, Int8Rowwise) else 0.3
    assert np.median(relative_errors(model, out, 4)) < bound


def test_experts_can_stay_in_float32(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    export_decoder(tmp_path, full, Cpu())
    found = operators(quantized(full, tmp_path / "out", Blockwise(32), {"*.1.mlp.experts": None}))
    assert (found["layers.0.mlp.experts.int4"], found["layers.1.mlp.experts"]) == ("QMoE", "MoE")


def test_experts_that_no_block_divides_are_named(tmp_path: Path) -> None:
    save_model("qwen3_moe-odd", tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    export_decoder(tmp_path, full, Cpu())
    with pytest.raises(StageError, match=r"layers\.0\.mlp\.experts: blocks.*\*\.experts"):
        quantized(full, tmp_path / "out", Blockwise())


def test_a_pattern_without_a_match_names_the_near_one(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="'lm_heads'; did you mean 'lm_head'"):
        quantized(tiny, tmp_path, INT8, {"lm_heads": None})


def test_quantized_models_are_not_quantized_again(tiny: Path, tmp_path: Path) -> None:
    once = quantized(tiny, tmp_path / "once", INT8)
    with pytest.raises(StageError, match="quantised already"):
        quantized(once, tmp_path / "twice", Blockwise())


@pytest.mark.parametrize(
    ("scheme", "exceptions", "bound"),
    [
        (Int8Rowwise(WEIGHT_BITS), {}, 1.01),
        (Int8Rowwise(7), {}, 1.01),
        (Blockwise(32), {"lm_head": INT8, "*.down_proj": INT8}, 1.08),
        (Blockwise(), {"lm_head": INT8}, 1.13),
    ],
)
def test_real_weights_keep_their_perplexity(
    scheme: Scheme,
    exceptions: Mapping[str, Scheme | None],
    bound: float,
    stories: Path,
    tmp_path: Path,
) -> None:
    texts = sample_texts(stories, slots=8, count=200)
    change = mean_loss(quantized(stories, tmp_path, scheme, exceptions), texts) - mean_loss(
        stories, texts
    )
    assert np.exp(change) < bound


def sample_texts(folder: Path, slots: int, count: int) -> NDArray[np.int64]:
    """Stories that the model tells, [slots, count]."""
    random = np.random.default_rng(0)
    runner = GraphRunner(folder, slots, count + 2)
    ids = np.ones((slots, 1), np.int64)
    while ids.shape[1] < count:
        found = runner.step({b: [int(ids[b, -1])] for b in range(slots)})
        noisy = np.concatenate([found[b] for b in range(slots)])
        noisy += random.gumbel(size=noisy.shape).astype(np.float32)
        ids = np.hstack([ids, noisy.argmax(axis=1)[:, None]])
    return ids


def mean_loss(folder: Path, texts: NDArray[np.int64]) -> float:
    """The mean negative log-likelihood of the texts, in nats per token."""
    runner = GraphRunner(folder, len(texts), texts.shape[1])
    found = runner.step({b: row.tolist() for b, row in enumerate(texts)})
    losses: list[float] = []
    for b, row in enumerate(texts):
        logits = found[b][:-1].astype(np.float64)
        normal = np.log(np.exp(logits).sum(axis=1))
        losses += (normal - logits[np.arange(len(row) - 1), row[1:]]).tolist()
    return float(np.mean(losses))
