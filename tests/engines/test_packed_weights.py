"""Weights that are kept in the form that the kernels want, and mapped."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lifecycle.engines.adapters import FILE, AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.onnx_file import change_external_tensors, external_tensors
from lifecycle.engines.ort import OnnxEngine
from lifecycle.errors import EngineError
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu

SCHEMES: dict[str, Callable[[], Scheme]] = {
    "int8-rowwise": lambda: Int8Rowwise(8),
    "int4": lambda: Blockwise(32),
}


@pytest.fixture(scope="module")
def adapted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    export_decoder(data_dir / "stories260K" / "hf", folder, Cpu(), slots=(2, 4))
    return folder


@pytest.fixture(scope="module")
def adapter(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = AdapterLayout.load(adapted)
    assert layout is not None
    folder = tmp_path_factory.mktemp("adapters") / "a"
    write_random_adapter(folder, layout, seed=2)
    return folder


def logits(model: Path, packed: Path | None, adapter: Path | None = None) -> NDArray[np.float32]:
    options = EngineOptions(2, packed_weights=packed, kernels="onnxruntime")
    with closing(OnnxEngine.open(model, options)) as engine:
        if adapter is not None:
            engine.load_adapter("a", adapter)
        number = int(adapter is not None)
        return engine.forward([Row(0, 0, [1, 5, 9, 30], 4), Row(1, 0, [1, 7], 2, adapter=number)])


@pytest.mark.parametrize("scheme", ["float32", *SCHEMES])
def test_logits_are_the_same_to_the_last_bit(
    adapted: Path, adapter: Path, tmp_path: Path, scheme: str
) -> None:
    model = adapted
    if scheme != "float32":
        model = tmp_path / "model"
        model.mkdir()
        quantize_graph(adapted, model, scheme, SCHEMES[scheme]())
        (model / FILE).write_bytes((adapted / FILE).read_bytes())
    packed = tmp_path / "packed"
    for with_adapter in (None, adapter):
        expected = logits(model, None, with_adapter)
        made = logits(model, packed, with_adapter)
        files = {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
        mapped = logits(model, packed, with_adapter)
        assert np.array_equal(made, expected) and np.array_equal(mapped, expected)
        assert files == {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
    # The graph with slots takes from the other one's file all that they have in common.
    (entry,) = packed.iterdir()
    sizes = sorted(path.stat().st_blocks for path in entry.glob("*.data"))
    assert len(list(entry.glob("*.onnx"))) == 2
    assert len(sizes) == 1 or sizes[0] < sizes[1] / 10


def test_other_weights_take_the_place_of_old_ones(adapted: Path, tmp_path: Path) -> None:
    model, packed = _copy(adapted, tmp_path), tmp_path / "packed"
    before = logits(model, packed)
    data = model / "model.onnx.data"
    weights = np.frombuffer(data.read_bytes(), np.float32) * np.float32(0.5)
    data.write_bytes(weights.tobytes())
    after = logits(model, packed)
    assert np.array_equal(after, logits(model, None))
    assert not np.array_equal(after, before)
    assert len(list(packed.iterdir())) == 1


@pytest.mark.parametrize("kind", ["cut", "gone", "noise"])
def test_what_is_damaged_is_made_anew(adapted: Path, tmp_path: Path, kind: str) -> None:
    packed = tmp_path / "packed"
    expected = logits(adapted, packed)
    if kind == "noise":
        (graph,) = packed.rglob("*.onnx")
        graph.write_bytes(b"noise" * 100)
    else:
        (data,) = packed.rglob("*.data")
        if kind == "cut":
            os.truncate(data, data.stat().st_size // 2)
        else:
            data.unlink()
    assert np.array_equal(logits(adapted, packed), expected)
    assert len(list(packed.rglob("*.data"))) == 1
    assert np.array_equal(logits(adapted, packed), expected)


def test_a_folder_that_cannot_be_written_is_done_without(
    adapted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = tmp_path / "packed"
    packed.write_text("a file")
    with caplog.at_level(logging.WARNING):
        found = logits(adapted, packed)
    assert np.array_equal(found, logits(adapted, None))
    assert f"is opened without packed weights from {packed}" in caplog.text


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.engines.test_packed_weights import logits
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
model, packed = map(Path, sys.argv[1:])
print(logits(model, packed).sum() == logits(model, None).sum())
print([path.name for path in packed.rglob("*") if path.is_file()])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files are set as Linux does")
def test_a_full_disk_is_done_without(adapted: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(adapted), str(tmp_path / "packed")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout == "True\n[]\n", run.stdout + run.stderr


def test_a_folder_of_everybody_is_refused(adapted: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(EngineError, match="anyone may write to the folder of packed weights"):
        logits(adapted, tmp_path)


def test_many_may_open_it_at_once(adapted: Path, tmp_path: Path) -> None:
    packed, expected = tmp_path / "packed", logits(adapted, None)
    found: list[NDArray[np.float32]] = []
    threads = [
        threading.Thread(target=lambda: found.append(logits(adapted, packed))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(one, expected) for one in found)
    assert len(list(packed.rglob("*.onnx"))) == 1
    assert np.array_equal(logits(adapted, packed), expected)


def _copy(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=300), st.dictionaries(st.text(max_size=200), st.text())
    ),
    st.dictionaries(st.text(max_size=200), st.text(), min_size=1),
)
def test_places_of_tensors_are_read_and_written(
    tensors: dict[str, dict[str, str]], new: dict[str, str]
) -> None:
    graph = onnx.GraphProto(name="g", doc_string="kept")
    for name, entries in tensors.items():
        tensor = graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT, dims=[4, 300])
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    graph.initializer.add(name="own", data_type=onnx.TensorProto.FLOAT, raw_data=b"\0" * 300)
    model = onnx.ModelProto(graph=graph, ir_version=10, producer_name="p")
    data = model.SerializeToString()
    given = {name: entries for name, entries in tensors.items() if entries}
    assert external_tensors(data) == given
    assert onnx.ModelProto.FromString(change_external_tensors(data, lambda *_: None)) == model

    changed = onnx.ModelProto.FromString(change_external_tensors(data, lambda *_: new))
    for tensor in changed.graph.initializer:
        if tensor.name in given:
            assert {e.key: e.value for e in tensor.external_data} == new
            del tensor.external_data[:]
    for tensor in model.graph.initializer:
        del tensor.external_data[:]
    assert changed == model
