"""Keys and values share the pages of a cache where our attention is all that reads it, in any graph of a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lifecycle.engines.ort as module
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.errors import EngineError
from tests.engines.conftest import Model

FREE = SamplingParams(max_tokens=20, ignore_eos=True)


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 160, length).tolist() for length in lengths]


@pytest.mark.parametrize("kernels", ["native", "onnxruntime"])
def test_keys_and_values_share_pages_where_our_kernels_read_them(
    random_model: Model, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, options = prompts(30, 20), EngineOptions(2, kernels=kernels)
    engines = [OnnxEngine.open(random_model.graph, options)]
    monkeypatch.setattr(module, "attends", lambda *_: False)
    engines.append(OnnxEngine.open(random_model.graph, options))
    told: list[Any] = []
    for engine in engines:
        keys, values = list(engine._backend.cache.rows(2).values())[:2]  # type: ignore[attr-defined]
        gap = values.ctypes.data - keys.ctypes.data
        is_shared = kernels == "native" and engine is engines[0]
        assert (gap == keys.shape[-1] * keys.itemsize) == is_shared
        told.append(engine.generate(texts, SamplingParams(20, logprobs=3, ignore_eos=True)))
        told.append(engine.logits(texts[0]).tolist())
    assert told[:2] == told[2:]


def in_function(model: onnx.ModelProto) -> None:
    """Put each attention into a function of the model."""
    for n, node in enumerate(model.graph.node):
        if node.op_type != "GroupQueryAttention":
            continue
        names = [f"i{k}" if name else "" for k, name in enumerate(node.input)]
        outputs = [f"o{k}" for k in range(len(node.output))]
        body = onnx.NodeProto()
        body.CopyFrom(node)
        body.input[:], body.output[:] = names, outputs
        given = [name for name in names if name]
        imports = list(model.opset_import)
        function = onnx.helper.make_function("other", f"F{n}", given, outputs, [body], imports)
        model.functions.append(function)
        node.op_type, node.domain = function.name, "other"
        node.input[:] = [name for name in node.input if name]
        del node.attribute[:]
    model.opset_import.append(onnx.helper.make_opsetid("other", 1))


def through_identity(model: onnx.ModelProto) -> None:
    """Let an attention read what another node has passed on."""
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [node.input[3]], ["passed"]))
    node.input[3] = "passed"


def unknown_attention(model: onnx.ModelProto) -> None:
    """Give each attention an attribute that ours does not know."""
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("smooth_softmax", 0))


def changed(graph: Path, change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load(graph, load_external_data=False)
    change(model)
    return model.SerializeToString()


@pytest.mark.parametrize("change", [in_function, through_identity, unknown_attention])
def test_a_cache_that_another_operator_reads_lies_as_that_one_reads_it(
    random_model: Model, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    copy = shutil.copytree(random_model.graph, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(changed(copy / "model.onnx", change))
    text = prompts(30)[0]
    options = EngineOptions(2, prefill_chunk=1, kernels="native")
    expected = OnnxEngine.open(random_model.graph, options).logits(text)
    found = OnnxEngine.open(copy, options).logits(text)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_graph_that_comes_later_is_refused_if_it_reads_the_cache_otherwise(
    random_model: Model, tmp_path: Path
) -> None:
    copy = shutil.copytree(random_model.graph, tmp_path / "copy")
    (copy / "hidden.onnx").unlink(missing_ok=True)
    engine = OnnxEngine.open(copy, EngineOptions(2, kernels="native"))
    (copy / "hidden.onnx").write_bytes(changed(copy / "model.onnx", unknown_attention))
    with pytest.raises(EngineError, match=r"hidden.onnx reads its cache by other operators"):
        engine.embed([[1, 2, 3]])


@pytest.mark.parametrize("size", [7, 1 << 40])
def test_a_bad_graph_that_is_not_asked_for_keeps_none_from_opening(
    random_model: Model, tmp_path: Path, size: int
) -> None:
    copy = shutil.copytree(random_model.graph, tmp_path / "copy")
    with (copy / "hidden.onnx").open("wb") as file:
        file.truncate(size)
    text = prompts(10)
    engine = OnnxEngine.open(copy, EngineOptions(2, kernels="native"))
    expected = OnnxEngine.open(random_model.graph, EngineOptions(2)).generate(text, FREE)
    assert engine.generate(text, FREE) == expected
    with pytest.raises(EngineError, match=r"hidden.onnx is (damaged|larger than 2 GiB)"):
        engine.embed([[1, 2, 3]])
