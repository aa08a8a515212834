"""Static int8: what ONNX Runtime makes of it, its numbers, and the ranges that it is given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.errors import StageError
from lifecycle.graph.activations import decoder_samples, histograms
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.ranges import Calibrate, Histogram, Range
from lifecycle.graph.reading import import_graph
from lifecycle.graph.static import Int8Static, observed
from lifecycle.pipeline.artifact import hash_tree
from tests.exact import WEIGHT_BITS
from tests.graph import graphs
from tests.graph.models import VOCAB
from tests.graph.running import GraphRunner
from tests.graph.test_any_graph import operators, run

IMAGES = np.random.default_rng(4).standard_normal((24, 3, 12, 12)).astype(np.float32)
IDS = np.random.default_rng(5).integers(0, 1024, (24, 9))


def calibrated(
    source: Path, samples, calibrate: Calibrate = "minmax", bits: int = WEIGHT_BITS
) -> Int8Static:
    found = histograms(source, observed(source), samples, lambda done, total: None)
    return Int8Static(bits, {k: v.range(calibrate, 99.9) for k, v in found.items()})


def quantized(source: Path, scheme: Scheme, name: str = "static", **options) -> Path:
    out = source.parent / name
    out.mkdir()
    quantize_graph(source, out, "int8-static", scheme, **options)
    return out


def runs_as(folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(folder / "model.onnx", options)
    model = onnx.load(folder / "optimised.onnx", load_external_data=False)
    (folder / "optimised.onnx").unlink()
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    source = graphs.write_classifier(tmp_path / "c.onnx", graphs.classifier_weights())
    out = tmp_path / "classifier"
    out.mkdir()
    import_graph(source, out)
    return out


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    source = graphs.write_encoder(tmp_path / "e.onnx", graphs.encoder_weights())
    out = tmp_path / "encoder"
    out.mkdir()
    import_graph(source, out)
    return out


def test_a_convolutional_network_runs_in_integers(classifier: Path) -> None:
    scheme = calibrated(classifier, [{"image": IMAGES[i : i + 1]} for i in range(16)])
    out = quantized(classifier, scheme)
    found = runs_as(out)
    assert found["QLinearConv"] == 2
    ones = ("QLinearAdd", "QLinearGlobalAveragePool", "QGemm")
    assert [found[name] for name in ones] == [1, 1, 1], found
    assert not found.keys() & {"Conv", "Gemm", "Add", "Relu", "GlobalAveragePool"}
    wanted = graphs.run_classifier(graphs.classifier_weights(), IMAGES[16:])
    got = run(out, image=IMAGES[16:])
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)
    assert set(operators(out).values()) > {"QuantizeLinear", "DequantizeLinear", "Conv"}


def test_products_run_in_integers(encoder: Path) -> None:
    scheme = calibrated(encoder, [{"ids": row[None]} for row in IDS[:16]])
    out = quantized(encoder, scheme)
    assert runs_as(out)["MatMulIntegerToFloat"] + runs_as(out)["QLinearMatMul"] == 3
    wanted = graphs.run_encoder(graphs.encoder_weights(), IDS[16:])
    got = run(out, ids=IDS[16:])
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)
    assert np.array_equal(got[:1], run(out, ids=IDS[16:17]))


def test_skipped_convolutions_stay(classifier: Path) -> None:
    scheme = calibrated(classifier, [{"image": IMAGES[:1]}])
    out = quantized(classifier, scheme, exceptions={"conv1": None, "scores": None})
    found = runs_as(out)
    assert found["QLinearConv"] == 1
    assert found["Gemm"] == 1
    assert found["Conv"] + found["FusedConv"] + found["NhwcFusedConv"] == 1


def test_the_same_samples_give_the_same_bytes(classifier: Path) -> None:
    samples = [{"image": IMAGES[i : i + 1]} for i in range(4)]
    made = [
        quantized(classifier, calibrated(classifier, samples, "entropy"), name)
        for name in ("one", "two")
    ]
    assert hash_tree(made[0]) == hash_tree(made[1])


def test_values_that_are_not_finite_are_named(classifier: Path) -> None:
    with pytest.raises(StageError, match="'image' takes values that are not finite"):
        calibrated(classifier, [{"image": np.full((1, 3, 12, 12), np.inf, np.float32)}])


def test_a_decoder_does_not_feel_its_batch(tiny: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    texts = [random.integers(3, VOCAB, 20).tolist() for _ in range(8)]
    samples = list(decoder_samples(texts))
    scheme = calibrated(tiny, samples)
    out = tmp_path / "static"
    out.mkdir()
    quantize_graph(tiny, out, "int8-static", scheme)
    assert DecoderInfo.load(out).scheme == "int8-static"
    ids, others = texts[0], texts[1:4]
    alone = GraphRunner(out, 4).step({1: ids})[1]
    among = GraphRunner(out, 4).step({1: ids, **dict(zip((0, 2, 3), others, strict=True))})[1]
    assert np.array_equal(alone, among)
    wanted = GraphRunner(tiny).prefill(ids)
    assert np.linalg.norm(alone - wanted) < 0.1 * np.linalg.norm(wanted)


def histogram(*parts: NDArray[np.float32]) -> Histogram:
    found = Histogram("x")
    for part in parts:
        found.add(part)
    return found


def test_a_growing_range_keeps_the_counts() -> None:
    random = np.random.default_rng(0)
    parts = [random.standard_normal(1000).astype(np.float32) * 10**i for i in range(4)]
    found = histogram(*parts)
    values = np.concatenate(parts)
    assert found.counts.sum() == len(values)
    assert (found.low, found.high) == (values.min(), values.max())
    wanted, _ = np.histogram(values, len(found.counts), (-found.reach, found.reach))
    assert np.abs(np.cumsum(found.counts) - np.cumsum(wanted)).max() <= 4


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    found = histogram(values).range("percentile", 99)
    low, high = np.percentile(values, [0.5, 99.5])
    assert abs((float(found.scale) * 255) - (high - low)) < 0.02
    assert abs(float(found.zero) * float(found.scale) + low) < 0.02


def test_entropy_cuts_off_what_is_rare() -> None:
    values = np.random.default_rng(2).standard_normal(100_000).astype(np.float32)
    found = histogram(np.append(values, np.float32(60)))
    assert found.range("minmax", 100).scale * 255 > 60
    assert 4 < found.range("entropy", 100).scale * 255 < 20


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0.0, 5.0, 0), (-5.0, 0.0, 255), (2.0, 5.0, 0), (0.0, 0.0, 0)]
)
def test_zero_is_exact(low: float, high: float, zero: int) -> None:
    found = Range.covering(low, high)
    assert found.zero == zero
    assert found.scale > 0
