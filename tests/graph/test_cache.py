"""Caches of integers: scales as PyTorch's keys and values ask for, and attention over what is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.errors import StageError
from lifecycle.graph.cache import KvType, QuantizedCache, calibrate_cache, channel_scales
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.rotation import Rotation
from lifecycle.graph.targets import Cpu
from tests.graph.models import VOCAB, save_model, torch_logits
from tests.graph.running import GraphRunner

TEXTS = [np.random.default_rng(seed).integers(3, VOCAB, 40).tolist() for seed in range(4)]
LAST = {"int8": 127, "int4": 7}
KV_TYPES: list[KvType] = ["int8", "int4"]


def export(name: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    model = save_model(name, folder)
    out = folder / "onnx"
    out.mkdir()
    export_decoder(folder, out, Cpu())
    return model, out


def quantise(source: Path, out: Path, kv_dtype: KvType) -> QuantizedCache:
    cache = calibrate_cache(Calibration(source, TEXTS), DecoderInfo.load(source), kv_dtype)
    out.mkdir()
    quantize_graph(source, out, "fp32", None, cache=cache)
    return cache


@pytest.mark.parametrize("name", ["llama", "llama-odd-heads", "phi3-partial", "qwen3"])
def test_calibration_sees_the_keys_and_values_that_pytorch_stores(
    name: str, tmp_path: Path
) -> None:
    model, source = export(name, tmp_path)
    calibration = Calibration(source, TEXTS)
    caches = [model(torch.tensor([text])).past_key_values for text in TEXTS]
    for layer in range(2):
        for part, found in zip(("keys", "values"), calibration.cached(layer), strict=True):
            wanted = [getattr(cache.layers[layer], part)[0] for cache in caches]
            joined = torch.cat(wanted, dim=1).detach().numpy()
            np.testing.assert_allclose(found, joined, atol=1e-4)


def rotated(x: NDArray[Any], angles: NDArray[Any], interleaved: bool) -> NDArray[Any]:
    """Pairs of channels of [tokens, size] as complex numbers, turned by [tokens, pairs]."""
    count = angles.shape[1]
    pairs = x.copy()
    parts = (slice(0, 2 * count, 2), slice(1, 2 * count, 2))
    if not interleaved:
        parts = (slice(0, count), slice(count, 2 * count))
    turned = (x[:, parts[0]] + 1j * x[:, parts[1]]) * np.exp(1j * angles)
    pairs[:, parts[0]], pairs[:, parts[1]] = turned.real, turned.imag
    return pairs


@given(st.integers(0, 99), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_moved_key_is_the_key_rotated_there(by: int, interleaved: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    angles = np.arange(100)[:, None] * np.array([1.0, 0.1, 0.003])
    rotation = Rotation(*(1.3 * f(angles) for f in (np.cos, np.sin)), interleaved)
    keys, positions = random.standard_normal((20, 8)), random.integers(0, 100, 20)
    here = rotated(keys, angles[positions], interleaved)
    there = rotated(keys, angles[(positions + by) % 100], interleaved)
    found = rotation.moved(here[None], positions, by)[0]
    np.testing.assert_allclose(found, there, atol=1e-6)


def test_scales_hold_where_no_calibration_text_reaches(tmp_path: Path) -> None:
    """Slow rotations turn a key only in later parts of the context."""
    model, source = export("llama", tmp_path)
    cache = calibrate_cache(Calibration(source, TEXTS), DecoderInfo.load(source), "int8")
    text = [token for _ in range(3) for token in TEXTS[0]][:120]
    keys = model(torch.tensor([text])).past_key_values.layers[0].keys[0].detach().numpy()
    largest = np.abs(keys).max(axis=1)
    assert (largest <= 1.05 * LAST["int8"] * cache.scales[0][0]).all()
    seen = np.abs(Calibration(source, TEXTS).cached(0)[0]).max(axis=1)
    assert (largest > 1.05 * seen).any()


@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("name", ["llama", "llama-odd-heads", "llama-biases"])
def test_attention_reads_what_is_stored(kv_dtype: KvType, name: str, tmp_path: Path) -> None:
    model, source = export(name, tmp_path)
    cache = quantise(source, tmp_path / "out", kv_dtype)
    ids = np.random.default_rng(9).integers(3, VOCAB, 60).tolist()
    found = GraphRunner(tmp_path / "out").prefill(ids)
    plain = torch_logits(model, ids)
    wanted = _with_attention(model, _rounding_attention(cache), ids)
    assert np.linalg.norm(found - wanted) < 2e-3 * np.linalg.norm(wanted)
    assert np.linalg.norm(plain - wanted) > 5e-3 * np.linalg.norm(wanted)


def _rounding_attention(cache: QuantizedCache) -> Callable[..., Any]:
    last = LAST[cache.kv_dtype]

    def rounded(x: torch.Tensor, scale: NDArray[np.float32]) -> torch.Tensor:
        steps = torch.from_numpy(scale)[None, :, None, :]
        return torch.clamp(torch.round(x / steps), -last - 1, last) * steps

    def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        of_keys, of_values = cache.scales[module.layer_idx]
        key, value = rounded(key, of_keys), rounded(value, of_values)
        return eager_attention_forward(module, query, key, value, *rest, **named)

    return attend


def _with_attention(
    model: PreTrainedModel, attend: Callable[..., Any], ids: list[int]
) -> NDArray[np.float32]:
    AttentionInterface.register("rounding", attend)
    AttentionMaskInterface.register("rounding", eager_mask)
    model.set_attn_implementation("rounding")
    return torch_logits(model, ids)


@pytest.mark.parametrize("kv_dtype", KV_TYPES)
@pytest.mark.parametrize("name", ["gemma2", "mistral-window", "smollm3-window", "gpt2", "mixtral"])
def test_every_kind_of_attention_takes_it(kv_dtype: KvType, name: str, tmp_path: Path) -> None:
    model, source = export(name, tmp_path)
    quantise(source, tmp_path / "out", kv_dtype)
    ids = TEXTS[0]
    wanted = torch_logits(model, ids)
    error = np.linalg.norm(GraphRunner(tmp_path / "out").prefill(ids) - wanted)
    assert 0 < error < {"int8": 0.03, "int4": 0.5}[kv_dtype] * np.linalg.norm(wanted)


@given(st.sampled_from(KV_TYPES), st.integers(0, 2**32 - 1))
def test_scales_reach_in_8_bits_and_square_errors_fall_in_4(kv_dtype: KvType, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 300, 4)).astype(np.float32)
    x[0, :, 0] = 0
    last, largest = LAST[kv_dtype], np.abs(x).max(axis=1)
    scales = channel_scales([x[:, :100], x[:, 100:]], kv_dtype)
    assert scales[0, 0] > 0

    def error(scale: NDArray[np.float32]) -> NDArray[np.float32]:
        steps = np.clip(np.rint(x / scale[:, None]), -last - 1, last)
        return np.square(steps * scale[:, None] - x).sum(axis=1)

    if kv_dtype == "int8":
        assert (np.abs(x) <= last * scales[:, None] * 1.0001).all()
    else:
        reaching = np.where(largest == 0, 1, largest / last).astype(np.float32)
        assert (error(scales) <= error(reaching) * 1.0001).all()
        assert (scales < reaching)[1].any()


def test_a_graph_with_a_quantised_cache_is_no_source(tmp_path: Path) -> None:
    _, source = export("llama", tmp_path)
    quantise(source, tmp_path / "out", "int8")
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(StageError, match=r"quantised already \(int8 cache\)"):
        quantize_graph(tmp_path / "out", again, "fp32", None)
