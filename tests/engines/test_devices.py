"""Graphs that run on a device: what it reads is copied to it when it is bound, and its cache may be there, where PyTorch
may reach it.

The provider of these tests is the CPU's, whose memory is said to be a device's: what would be copied to one is copied, so
that what is not bound again does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from lifecycle.engines import device_cache, ort_backend, tensor_cache
from lifecycle.engines import ort as ort_module
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.beams import BeamParams
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.device_cache import DeviceCache
from lifecycle.engines.draft_model import DraftModel
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.ort_backend import OrtBackend
from lifecycle.engines.ort_session import PAST
from lifecycle.engines.pace import Pace
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.engines.slot_cache import SlotCache
from lifecycle.engines.tensor_cache import TensorCache
from lifecycle.errors import EngineError
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.cache import calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu
from tests.engines.conftest import Model
from tests.graph.models import save_model

PROMPTS = [[3, 5, 8, 13, 21], [34, 55], [89] * 40, [14, 3]]
FREE = SamplingParams(max_tokens=20, ignore_eos=True)

Answers = list[tuple[int, ...]]


class Memory(NamedTuple):
    name: str
    device_id: int = 0


@pytest.fixture(scope="module")
def slotted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with two slots for adapters, and three of those, all different."""
    root = tmp_path_factory.mktemp("slots")
    save_model("llama-tied", root / "hf")
    (root / "onnx").mkdir()
    export_decoder(root / "hf", root / "onnx", Cpu(), slots=(2, 4))
    layout = AdapterLayout.load(root / "onnx")
    assert layout is not None
    for n in range(3):
        write_random_adapter(root / f"a{n}", layout, seed=n)
    return root


@pytest.fixture(scope="module")
def on_host(
    random_model: Model, slotted: Path, stories: Model, story: list[int]
) -> dict[str, Answers]:
    """What the host answers, without adapters and with each, one request at a time; and beams, and quotations."""
    engine = OnnxEngine.open(random_model.graph, EngineOptions(1, 96, kernels="onnxruntime"))
    found = {"plain": answers(engine)}
    engine = OnnxEngine.open(random_model.graph, EngineOptions(6, 96, kernels="onnxruntime"))
    found["beams"] = told_beams(engine)
    engine = OnnxEngine.open(stories.graph, EngineOptions(1, 96, kernels="onnxruntime"))
    found["quotes"] = answers(engine, prompts=quotes(story))
    for n in range(3):
        engine = OnnxEngine.open(slotted / "onnx", EngineOptions(1, 96, kernels="onnxruntime"))
        engine.load_adapter("it", slotted / f"a{n}")
        found[f"a{n}"] = answers(engine, adapter="it")
    return found


@pytest.fixture(params=["steps", "steps and cache", "steps and tensors"])
def device(
    request: pytest.FixtureRequest, on_host: dict[str, Answers], monkeypatch: pytest.MonkeyPatch
) -> str:
    """From here on sessions say that a device reads their inputs, and take copies of what is bound to them."""
    has_cache = request.param != "steps"
    bind = ort.IOBinding.bind_ortvalue_input

    def memories(session: ort.InferenceSession) -> list[Memory]:
        names = [each.name for each in session.get_inputs()]
        return [Memory("Cpu" if n.startswith(PAST) and not has_cache else "Near") for n in names]

    def bind_copy(binding: ort.IOBinding, name: str, value: ort.OrtValue) -> None:
        is_there = name.startswith(PAST)
        copy = value if is_there else ort.OrtValue.ortvalue_from_numpy(value.numpy().copy())
        kept.append(copy)
        bind(binding, name, copy)

    def bind_array(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
        bind_copy(binding, name, ort.OrtValue.ortvalue_from_numpy(array))

    kept: list[ort.OrtValue] = []
    monkeypatch.setattr(ort.InferenceSession, "get_input_memory_infos", memories)
    monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", bind_copy)
    monkeypatch.setattr(ort.IOBinding, "bind_cpu_input", bind_array)
    monkeypatch.setitem(device_cache._DEVICES, "Near", "cpu")
    monkeypatch.setattr(tensor_cache, "reaches", lambda _: request.param == "steps and tensors")
    return request.param


def opened(graph: Path, slots: int, **options: Any) -> OnnxEngine:
    """An engine in ONNX Runtime's kernels, with chunks that some of the prompts are longer than."""
    found = EngineOptions(slots, 96, prefill_chunk=16, kernels="onnxruntime", **options)
    return OnnxEngine.open(graph, found)


def told_beams(engine: OnnxEngine) -> Answers:
    found = engine.beam_search(PROMPTS, SamplingParams(12), BeamParams(3))
    return [tuple(beam.token_ids) for beams in found for beam in beams]


def answers(
    engine: OnnxEngine, adapter: str | None = None, prompts: Sequence[list[int]] = PROMPTS
) -> Answers:
    return [tuple(found.token_ids) for found in engine.generate(prompts, FREE, adapter=adapter)]


def quotes(story: list[int]) -> list[list[int]]:
    """Texts that begin again, so that what comes next has come before, and may come otherwise."""
    return [story[1 : 1 + n] * 2 + story[1 : 1 + n // 3] for n in (8, 14, 20, 26)]


def test_answers_are_those_of_the_host(
    random_model: Model, on_host: dict[str, Answers], device: str
) -> None:
    engine = opened(random_model.graph, 3, prefix_cache_bytes=1 << 20)
    backend = engine._backend
    assert isinstance(backend, OrtBackend)
    caches = {"steps": SlotCache, "steps and cache": DeviceCache, "steps and tensors": TensorCache}
    assert type(backend._cache) is caches[device]
    assert [answers(engine) for _ in range(2)] == [on_host["plain"]] * 2
    # What ONNX Runtime alone reaches is not copied by ranges: nothing is kept of prompts.
    assert (engine.prefix_cache is None) == (device == "steps and cache")
    assert (engine.stats.prefix_hit_tokens > 0) == (device != "steps and cache")
    engine.close()


def test_equal_prompts_are_computed_once(
    random_model: Model, on_host: dict[str, Answers], device: str
) -> None:
    engine = opened(random_model.graph, 3)
    found = [tuple(each.token_ids) for each in engine.generate([PROMPTS[0]] * 3, FREE)]
    assert found == [on_host["plain"][0]] * 3
    times = 3 if device == "steps and cache" else 1
    assert engine.stats.prompt_tokens == times * len(PROMPTS[0])


def test_beams(random_model: Model, on_host: dict[str, Answers], device: str) -> None:
    assert told_beams(opened(random_model.graph, 6)) == on_host["beams"]


def test_who_gives_way_goes_on_where_it_was(
    random_model: Model, on_host: dict[str, Answers], device: str
) -> None:
    engine = opened(random_model.graph, 1)
    engine.submit(Request("2", PROMPTS[2], FREE, priority=1))
    found: dict[str, list[int | None]] = {"2": [], "1": []}
    while engine.num_running or engine.num_waiting:
        if engine.stats.generated_tokens == 8:
            engine.submit(Request("1", PROMPTS[1], FREE))
        for event in engine.step():
            found[event.request_id].append(event.token_id)
    assert {n: tuple(told) for n, told in found.items()} == {
        n: on_host["plain"][int(n)] for n in "21"
    }
    assert engine.stats.preemptions == 1
    is_anew = engine.stats.prompt_tokens > len(PROMPTS[1]) + len(PROMPTS[2])
    assert is_anew == (device == "steps and cache")


@pytest.mark.parametrize("by_model", [False, True])
def test_guesses_that_do_not_come_are_taken_back(
    stories: Model,
    story: list[int],
    on_host: dict[str, Answers],
    device: str,
    by_model: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Guesses take no time, so that as many are made as may be.
    monkeypatch.setattr(Pace, "decode_seconds", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(DraftModel, "ask_seconds", lambda self, num_requests: 0.0)
    draft = stories.graph if by_model else None
    engine = opened(stories.graph, 3, draft_tokens=4, draft_model=draft)
    assert answers(engine, prompts=quotes(story)) == on_host["quotes"]
    assert 0 < engine.stats.accepted_tokens < engine.stats.draft_tokens


def test_memory_that_is_taken_at_once_is_not_bounded_to_less(
    random_model: Model, on_host: dict[str, Answers], device: str
) -> None:
    per_token = 2 * 2 * 2 * 16 * 4
    if device == "steps":
        opened(random_model.graph, 3, kv_cache_bytes=per_token * 96)
        return
    is_copied = device == "steps and tensors"
    wanted = "at once, .*: allow that" if is_copied else "leave kv_cache_bytes out"
    with pytest.raises(EngineError, match=wanted):
        opened(random_model.graph, 3, kv_cache_bytes=per_token * 3 * 96)
    if is_copied:
        engine = opened(random_model.graph, 3, kv_cache_bytes=per_token * 3 * 400)
        assert answers(engine) == on_host["plain"]
        assert engine.stats.cache_capacity_bytes == per_token * 3 * 96


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_a_quantised_cache_in_tensors(
    stories: Model,
    story: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kv_dtype: Literal["int8", "int4"],
) -> None:
    info = DecoderInfo.load(stories.graph)
    cache = calibrate_cache(Calibration(stories.graph, [story[:60]]), info, kv_dtype)
    quantize_graph(stories.graph, tmp_path, "fp32", None, cache=cache)
    prompts = [story[:40], story[:40], [*story[:20], 5, 6]]
    found: list[list[tuple[int, ...]]] = []
    for _ in range(2):
        engine = opened(tmp_path, 2, prefix_cache_bytes=1 << 20)
        told = [engine.generate(prompts, FREE) for _ in range(2)]
        found.append([tuple(each.token_ids) for each in told[0] + told[1]])
        assert engine.stats.prefix_hit_tokens > 0
        monkeypatch.setattr(ort_module, "cache_device", lambda *_: ("cpu", 0))
        monkeypatch.setattr(tensor_cache, "reaches", lambda _: True)
    backend = engine._backend
    assert isinstance(backend, OrtBackend) and isinstance(backend._cache, TensorCache)
    assert found[0] == found[1]


def test_adapters_that_come_and_go_are_copied_anew(
    slotted: Path, on_host: dict[str, Answers], device: str
) -> None:
    engine = opened(slotted / "onnx", 4)
    engine.load_adapter("first", slotted / "a0")
    engine.load_adapter("second", slotted / "a1")
    assert answers(engine, "first") == on_host["a0"]
    assert answers(engine, "second") == on_host["a1"]
    engine.load_adapter("first", slotted / "a2", replace=True)
    assert answers(engine, "first") == on_host["a2"]
    assert answers(engine, "second") == on_host["a1"]


def test_memory_that_no_engine_takes_is_named(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memories(session: ort.InferenceSession) -> list[Memory]:
        return [Memory("Far", 2) for _ in session.get_inputs()]

    monkeypatch.setattr(ort.InferenceSession, "get_input_memory_infos", memories)
    with pytest.raises(EngineError, match="reads its cache in Far 2.*run attention on the CPU"):
        OnnxEngine.open(random_model.graph, EngineOptions(1, kernels="onnxruntime"))


@pytest.mark.parametrize("kind", [np.float32, np.int8, np.uint8])
def test_ranges_of_tensors_are_copied(kind: Any) -> None:
    heads, capacity, width = 2, 10, 4
    shape = 3, heads, capacity, width
    cache = TensorCache(("cpu", 0), ["key", "value"], shape, np.dtype(kind))
    assert cache.bytes_per_token == 2 * heads * width * np.dtype(kind).itemsize
    block = np.arange(2 * heads * 5 * width).reshape(2, heads, 5, width).astype(kind)
    cache.write(1, 2, block)
    assert not cache.read(0, 0, capacity).any() and not cache.read(2, 0, capacity).any()
    cache.copy(1, 2, 6, 3)
    kept = cache.read(1, 2, 7)
    cache.write(1, 2, np.zeros_like(block))
    # What was read is a copy.
    assert kept.dtype == kind and np.array_equal(kept, block)
    assert np.array_equal(cache.read(2, 3, 6), block[:, :, 1:4])
    assert not cache.read(2, 0, 3).any() and not cache.read(2, 6, capacity).any()
    # A slot holds what it has held until another text is written to it.
    cache.forget(2)
    cache.forget_passed(2, 6)
    assert np.array_equal(cache.read(2, 3, 6), block[:, :, 1:4])


def test_a_copy_that_fails_is_the_engines_error() -> None:
    cache = TensorCache(("cpu", 0), ["key"], (2, 1, 4, 2), np.dtype(np.float32))
    with pytest.raises(EngineError, match="PyTorch failed to copy the cache: .*size"):
        cache.write(0, 2, np.zeros((1, 1, 3, 2), np.float32))


def test_only_cuda_is_reached() -> None:
    assert not tensor_cache.reaches(("webgpu", 0))
    assert tensor_cache.reaches(("cuda", 0)) == torch.cuda.is_available()


def test_tensors_that_do_not_fit_say_what_to_lower() -> None:
    wanted = "no memory on cpu for a cache of .*: lower max_num_seqs, 3"
    with pytest.raises(EngineError, match=wanted):
        TensorCache(("cpu", 0), ["key"], (3, 1 << 20, 1 << 20, 64), np.dtype(np.float32))


@pytest.mark.parametrize("device", ["steps and cache", "steps and tensors"], indirect=True)
def test_attention_that_knows_no_lengths_is_refused(
    random_model: Model, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(rows: Any, *arguments: Any) -> dict[str, NDArray[Any]]:
        """As if each row were as wide as the step."""
        found = honest(rows, *arguments)
        lengths = found["query_seqlens"]
        width = max(2, int(lengths.max()))
        return found | {"query_seqlens": np.full_like(lengths, width)}

    honest = ort_backend.pack
    monkeypatch.setattr(ort_backend, "pack", pack)
    with pytest.raises(EngineError, match="attention on cpu takes no rows of .*: run it on the"):
        opened(random_model.graph, 2)


def test_a_device_without_memory_for_the_cache_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> ort.OrtValue:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", full)
    wanted = "no memory on cuda for a cache of 3 MiB .out of memory.*max_num_seqs, 3.*512 tokens"
    with pytest.raises(EngineError, match=wanted):
        DeviceCache(("cuda", 0), ["key", "value"], (3, 4, 512, 64), np.dtype(np.float32))
