"""Graphs that run on a device: what it reads is copied to it when it is bound, and its cache may be there.

The provider of these tests is the CPU's, whose memory is said to be a device's: what would be copied to one is copied, so
that what is not bound again does not change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from lifecycle.engines import device_cache
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.device_cache import DeviceCache
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.ort_backend import OrtBackend
from lifecycle.engines.ort_session import PAST
from lifecycle.engines.requests import SamplingParams
from lifecycle.errors import EngineError
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.export import export_decoder
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
def on_host(random_model: Model, slotted: Path) -> dict[str, Answers]:
    """What the host answers, without adapters and with each, one request at a time."""
    engine = OnnxEngine.open(random_model.graph, EngineOptions(1, 96, kernels="onnxruntime"))
    found = {"plain": answers(engine)}
    for n in range(3):
        engine = OnnxEngine.open(slotted / "onnx", EngineOptions(1, 96, kernels="onnxruntime"))
        engine.load_adapter("it", slotted / f"a{n}")
        found[f"a{n}"] = answers(engine, adapter="it")
    return found


@pytest.fixture(params=["steps", "steps and cache"])
def device(
    request: pytest.FixtureRequest, on_host: dict[str, Answers], monkeypatch: pytest.MonkeyPatch
) -> str:
    """From here on sessions say that a device reads their inputs, and take copies of what is bound to them."""
    has_cache = request.param == "steps and cache"
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
    return request.param


def answers(engine: OnnxEngine, adapter: str | None = None) -> Answers:
    return [tuple(found.token_ids) for found in engine.generate(PROMPTS, FREE, adapter=adapter)]


def test_answers_are_those_of_the_host(
    random_model: Model, on_host: dict[str, Answers], device: str
) -> None:
    options = EngineOptions(
        3, 96, prefill_chunk=16, kernels="onnxruntime", prefix_cache_bytes=1 << 20
    )
    engine = OnnxEngine.open(random_model.graph, options)
    is_there = device == "steps and cache"
    backend = engine._backend
    assert isinstance(backend, OrtBackend)
    assert isinstance(backend._cache, DeviceCache) == is_there
    # What is on a device is not copied by ranges: nothing is kept of prompts.
    assert (engine.prefix_cache is None) == is_there
    assert [answers(engine) for _ in range(2)] == [on_host["plain"]] * 2
    engine.close()


def test_adapters_that_come_and_go_are_copied_anew(
    slotted: Path, on_host: dict[str, Answers], device: str
) -> None:
    options = EngineOptions(4, 96, prefill_chunk=16, kernels="onnxruntime")
    engine = OnnxEngine.open(slotted / "onnx", options)
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


def test_a_device_without_memory_for_the_cache_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> ort.OrtValue:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", full)
    wanted = "no memory on cuda for a cache of 3 MiB .out of memory.*max_num_seqs, 3.*512 tokens"
    with pytest.raises(EngineError, match=wanted):
        DeviceCache(("cuda", 0), ["key", "value"], (3, 4, 512, 64), np.dtype(np.float32))
