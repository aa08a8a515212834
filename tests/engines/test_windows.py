"""Of a text a layer with a window keeps the window, whatever the other layers keep."""

from __future__ import annotations

import json
import re
import sys
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.ort_backend import CopyingOrtBackend
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.engines.slot_cache import SlotCache
from lifecycle.engines.windows import ALL_SEEN, Windows
from lifecycle.errors import EngineError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.engines.toy import ToyEngine
from tests.graph.models import save_model

WINDOW, HEADS, SIZE = 64, 2, 64
FREE = SamplingParams(max_tokens=300, ignore_eos=True)


@pytest.mark.parametrize(
    ("layers", "count", "held", "narrowest"),
    [
        ((), 100, 100, inf),
        ((0, 0), 100, 100, inf),
        ((40, 40), 100, 40, 40),
        ((40, 40), 10, 10, 40),
        ((40, 40, 40, 0), 100, 55, 40),
        ((40, 20), 30, 25, 20),
    ],
)
def test_what_is_held(layers: tuple[int, ...], count: int, held: float, narrowest: float) -> None:
    windows = Windows(layers)
    assert windows.held(count) == held
    assert windows.narrowest == narrowest
    assert ALL_SEEN.held(count) == count


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux promises zeros")
def test_each_layer_gives_back_what_is_behind_its_own_window() -> None:
    kind, names = np.dtype(np.float32), ["narrow", "wide", "all"]
    cache = SlotCache(names, (3, 2, 256, 64), kind, [20, 100, 0])
    arrays = cache.rows(3)
    for array in arrays.values():
        array[:] = 1
    wanted = {name: np.ones((3, 2, 256), bool) for name in names}
    # A page holds 16 tokens: one of which a token is seen stays, and goes when none is seen any more.
    for count, before, narrow, wide in [(90, 0, 64, 0), (103, 90, 80, 0), (140, 103, 112, 32)]:
        cache.forget_passed(1, count, before)
        wanted["narrow"][1, :, :narrow] = False
        wanted["wide"][1, :, :wide] = False
        for name, array in arrays.items():
            np.testing.assert_array_equal(array.any(axis=3), wanted[name])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen 2, of whose four layers the last three have a window."""
    folder = tmp_path_factory.mktemp("mixed")
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "hf")
    (folder / "onnx").mkdir()
    export_decoder(folder / "hf", folder / "onnx", Cpu())
    return folder / "onnx"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux promises zeros")
def test_a_long_text_takes_what_its_layers_look_back_on(mixed: Path) -> None:
    engine = OnnxEngine.open(mixed, EngineOptions(2, 900, prefill_chunk=32))
    backend = engine._backend
    assert isinstance(backend, CopyingOrtBackend)
    engine.submit(Request("long", list(range(3, 203)), FREE))
    most = 0.0
    while engine.num_running or engine.num_waiting:
        engine.step()
        if (count := engine.stats.prompt_tokens + engine.stats.generated_tokens) < WINDOW + 32:
            continue
        if not engine.num_running:
            break
        # The newest token is not in the cache yet.
        seen = count - (engine.stats.generated_tokens > 0)
        layer = 2 * HEADS * SIZE * 4
        assert engine.stats.cache_bytes == layer * (seen + 3 * WINDOW)
        found = {name: array[0, 0].any(axis=1) for name, array in backend.cache.rows(1).items()}
        assert all(found[f"past_key_values.0.{part}"][:seen].all() for part in ("key", "value"))
        held = [found[f"past_key_values.{n}.key"].sum() for n in (1, 2, 3)]
        # Pages of 16 tokens, and what has come since memory was given back last.
        assert min(held) >= WINDOW and max(held) <= WINDOW + 16 + 16 + 32
        most = max(most, sum(held) / 3)
    assert most >= WINDOW


def test_a_bounded_cache_has_room_by_windows() -> None:
    """For two long texts, where without windows it would have room for one."""
    prompts = [[1 + (n + k) % 9 for n in range(100)] for k in range(2)]
    found: dict[bool, int] = {}
    for is_mixed in (False, True):
        windows = Windows([16, 16, 16, 0]) if is_mixed else ALL_SEEN
        engine = ToyEngine.make(2, 160, 4, windows=windows, kv_cache_bytes=8 * 160)
        for n, prompt in enumerate(prompts):
            engine.submit(Request(str(n), prompt, SamplingParams(50, ignore_eos=True)))
        most = 0
        while engine.num_running or engine.num_waiting:
            engine.step()
            most = max(most, engine.num_running)
            assert engine.stats.cache_bytes <= 8 * 160
        found[is_mixed] = most
    assert found == {False: 1, True: 2}


def test_the_least_cache_follows_windows() -> None:
    assert ToyEngine.make(1, 160, 4, windows=Windows([16]), kv_cache_bytes=8 * 32)
    wanted = "kv_cache_bytes is 255; one context of 160 tokens takes 256"
    with pytest.raises(EngineError, match=wanted):
        ToyEngine.make(1, 160, 4, windows=Windows([16]), kv_cache_bytes=8 * 32 - 1)


@pytest.mark.parametrize("windows", [[4], [4, 4, -1, 0]])
def test_windows_that_are_not_of_the_model(mixed: Path, tmp_path: Path, windows: list[int]) -> None:
    values = json.loads((mixed / "decoder.json").read_text())
    assert values["windows"] == [0, WINDOW, WINDOW, WINDOW]
    (tmp_path / "decoder.json").write_text(json.dumps(values | {"windows": windows}))
    wanted = re.escape(f"windows is {windows}, expected one for each of 4 layers")
    with pytest.raises(EngineError, match=wanted):
        OnnxEngine.open(tmp_path)


def test_where_all_is_seen_nothing_is_given_back() -> None:
    engine = ToyEngine.make(2, 160, 4)
    engine.submit(Request("long", [1] * 60, SamplingParams(80, ignore_eos=True)))
    while engine.num_running or engine.num_waiting:
        engine.step()
        assert not any(engine.backend.passed.values())


def test_what_older_versions_have_written_is_of_all_layers(mixed: Path, tmp_path: Path) -> None:
    values = json.loads((mixed / "decoder.json").read_text())
    del values["windows"]
    for window, windows in ((24, (24,) * 4), (None, ())):
        older = values | {"sliding_window": window}
        (tmp_path / "decoder.json").write_text(json.dumps(older))
        assert DecoderInfo.load(tmp_path).windows == windows


def test_a_text_beyond_a_bounded_cache_is_embedded(tmp_path: Path) -> None:
    """Its layers hold their windows only, so it does fit; a short one goes in beside it later."""
    save_model("mistral-window", tmp_path / "hf")
    (tmp_path / "onnx").mkdir()
    export_decoder(tmp_path / "hf", tmp_path / "onnx", Cpu(), hidden_states=True)
    texts = [[1 + n % 5 for n in range(60)], [3, 4, 5]]
    whole = OnnxEngine.open(tmp_path / "onnx", EngineOptions(2, 64, prefill_chunk=16))
    backend = whole._backend
    assert isinstance(backend, CopyingOrtBackend)
    options = EngineOptions(
        2, 64, prefill_chunk=16, kv_cache_bytes=backend.bytes_per_token * (7 + 16)
    )
    bounded = OnnxEngine.open(tmp_path / "onnx", options)
    assert np.array_equal(bounded.embed(texts), whole.embed(texts))


def test_what_is_put_aside_counts_whole() -> None:
    engine = ToyEngine.make(1, 160, 4, windows=Windows([16]), kv_cache_bytes=8 * 160)
    engine.submit(Request("long", [1] * 60, SamplingParams(20, ignore_eos=True), priority=1))
    for _ in range(16):
        engine.step()
    assert engine.stats.cache_tokens == 16
    engine.submit(Request("urgent", [2], SamplingParams(4, ignore_eos=True)))
    engine.step()
    assert engine.stats.preemptions == 1
    assert engine.stats.cache_tokens >= 60 + 1
