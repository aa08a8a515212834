"""That nothing beside a request, and no way to cut its text, changes a bit of what it gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from benchmarks.batch_invariance import measure
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.native import Kernels
from lifecycle.engines.native.library import instruction_sets
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pace import Pace
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from tests.engines.conftest import Model
from tests.engines.test_ort import prompts


def test_no_neighbour_changes_a_request(random_model: Model, kernels: Kernels) -> None:
    options = EngineOptions(max_num_seqs=4, prefill_chunk=16, kernels=kernels)
    identical, total = measure(OnnxEngine.open(random_model.graph, options), mixes=12, seed=0)
    assert identical == total > 50


def test_attention_in_blocks_gives_the_same_where_scores_would_take_too_much(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = prompts(160, [200])[0]
    options = EngineOptions(kernels="onnxruntime")
    whole = OnnxEngine.open(random_model.graph, options).logits(text)
    with monkeypatch.context() as patch:
        patch.setattr("lifecycle.engines.ort._MOST_SCORES", 0)
        blocks = OnnxEngine.open(random_model.graph, options).logits(text)
    np.testing.assert_allclose(whole, blocks, atol=1e-4)
    assert not np.array_equal(whole, blocks)
    # The environment is as it was, and says how where it says anything.
    assert "ORT_GQA_DISABLE_FLASH_ATTENTION" not in os.environ
    monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", "0")
    assert np.array_equal(OnnxEngine.open(random_model.graph, options).logits(text), blocks)
    assert os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] == "0"


@pytest.fixture(params=["native", "scores", "blocks"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Our kernels, and ONNX Runtime's with both of its ways of attention."""
    if request.param == "blocks":
        monkeypatch.setattr("lifecycle.engines.ort._MOST_SCORES", 0)
    return "native" if request.param == "native" else "onnxruntime"


@pytest.fixture
def cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps carry as much of a prompt as a machine of changing speed would let them."""
    rng = np.random.default_rng(0)
    rooms = [None, 1, 2, 3, 4, 5, 7, 9, 12]
    monkeypatch.setattr(Pace, "prompt_room", lambda *_: rooms[rng.integers(len(rooms))])


@pytest.mark.parametrize("max_stall", [2.5, None])
@pytest.mark.parametrize("scheme", [Int8Rowwise(weight_bits=8), Blockwise(32)])
def test_no_neighbour_changes_a_quantised_request(
    random_model: Model,
    tmp_path: Path,
    scheme: Scheme,
    max_stall: float | None,
    cut_anywhere: None,
    kernels: Kernels,
) -> None:
    quantize_graph(random_model.graph, tmp_path, "test", scheme)
    options = EngineOptions(4, prefill_chunk=16, max_stall=max_stall, kernels=kernels)
    identical, total = measure(OnnxEngine.open(tmp_path, options), mixes=6, seed=2)
    assert total > 20
    # Without AVX-512, ONNX Runtime has a kernel for the last of an odd number of tokens for these blocks too.
    is_exact = (
        kernels == "native" or isinstance(scheme, Int8Rowwise) or "avx512f" in instruction_sets()
    )
    assert identical >= (total if is_exact else 0.95 * total)


def test_blocks_of_64_change_the_last_bits_of_few_requests(
    random_model: Model, tmp_path: Path, cut_anywhere: None
) -> None:
    """ONNX Runtime computes the last of an odd number of tokens in a step by another kernel (docs/decisions.md)."""
    quantize_graph(random_model.graph, tmp_path, "test", Blockwise(64))
    options = EngineOptions(max_num_seqs=4, prefill_chunk=16, kernels="onnxruntime")
    engine = OnnxEngine.open(tmp_path, options)
    identical, total = measure(engine, mixes=20, seed=2)
    assert identical >= 0.95 * total > 95
    text = prompts(160, [40])[0]
    whole = engine.logits(text)
    options = EngineOptions(1, prefill_chunk=1, kernels="onnxruntime")
    by_one = OnnxEngine.open(tmp_path, options).logits(text)
    assert np.abs(whole - by_one).max() < 0.02 * np.abs(whole).max()


@pytest.mark.parametrize("block_size", [64, 128])
def test_our_kernels_make_no_exception_of_blocks_of_64(
    random_model: Model, tmp_path: Path, cut_anywhere: None, block_size: Literal[64, 128]
) -> None:
    quantize_graph(random_model.graph, tmp_path, "test", Blockwise(block_size))
    options = EngineOptions(max_num_seqs=4, prefill_chunk=16, kernels="native")
    engine = OnnxEngine.open(tmp_path, options)
    identical, total = measure(engine, mixes=10, seed=2)
    assert identical == total > 45
    text = prompts(160, [90])[0]
    whole = engine.logits(text)
    for chunk in (1, 3, 64):
        options = EngineOptions(1, prefill_chunk=chunk, kernels="native")
        assert np.array_equal(OnnxEngine.open(tmp_path, options).logits(text), whole)


@pytest.fixture(scope="module", params=["int8", "int4"])
def small_cache(request: pytest.FixtureRequest, stories: Model, tmp_path_factory: Any) -> Path:
    """The model of stories with its keys and values in integers."""
    texts = prompts(512, [120, 200])
    info = DecoderInfo.load(stories.graph)
    cache = calibrate_cache(Calibration(stories.graph, texts), info, request.param)
    out = tmp_path_factory.mktemp(request.param)
    quantize_graph(stories.graph, out, "fp32", None, cache=cache)
    return out


def test_no_neighbour_changes_a_request_with_a_quantised_cache(
    small_cache: Path, kernels: Kernels
) -> None:
    options = EngineOptions(max_num_seqs=4, prefill_chunk=16, kernels=kernels)
    engine = OnnxEngine.open(small_cache, options)
    identical, total = measure(engine, mixes=5, seed=3)
    assert identical == total > 20


def test_a_quantised_cache_gives_the_same_bits_however_a_text_is_cut(
    small_cache: Path, kernels: Kernels
) -> None:
    text = prompts(512, [300])[0]
    options = EngineOptions(prefill_chunk=512, kernels=kernels)
    whole = OnnxEngine.open(small_cache, options).logits(text)
    for chunk, threads in ((1, 2), (7, 1), (128, 2)):
        options = EngineOptions(1, None, threads, chunk, kernels=kernels)
        engine = OnnxEngine.open(small_cache, options)
        assert np.array_equal(engine.logits(text), whole)


def test_what_is_taken_back_from_a_quantised_cache_leaves_nothing(small_cache: Path) -> None:
    text, other = prompts(512, [60, 60])
    engine = OnnxEngine.open(small_cache, EngineOptions(2))
    wanted = engine.logits(text)[30:]
    engine.forward([Row(1, 0, text[:30], 1)])
    engine.forward([Row(1, 30, other[:30], 1)])
    found = engine.forward([Row(1, 30, text[30:], 30)])
    assert np.array_equal(found, wanted)


def test_no_neighbour_changes_a_story(stories: Model) -> None:
    engine = OnnxEngine.open(stories.graph, EngineOptions(max_num_seqs=6, prefill_chunk=32))
    identical, total = measure(engine, mixes=8, seed=1)
    assert identical == total > 30


def test_a_quantised_cache_takes_its_share_of_memory(small_cache: Path, stories: Model) -> None:
    sizes = [
        OnnxEngine.open(folder).stats.cache_capacity_bytes
        for folder in (small_cache, stories.graph)
    ]
    assert sizes[1] / sizes[0] == {"int8": 4, "int4": 8}[DecoderInfo.load(small_cache).kv_dtype]
