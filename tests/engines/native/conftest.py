from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lifecycle.engines.native import library
from lifecycle.engines.native.compiler import FLAGS, compile_library, target_flag
from lifecycle.engines.native.swap import DOMAIN

Arrays = Mapping[str, NDArray[Any]]
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}


def compiled(folder: Path, *flags: str) -> Path:
    """The kernels with other flags, fast to compile. Products and sums become one operation as in an engine's."""
    made = folder / "kernels.so"
    own = [flag for flag in FLAGS if flag != "-O3"]
    compile_library(["c++"], [*own, "-O1", "-fexpensive-optimizations", *flags], made)
    return made


@pytest.fixture(scope="session")
def in_vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of a processor with the same vectors and no registers for matrices."""
    folder = tmp_path_factory.mktemp("vectors")
    return compiled(folder, "-DLIFECYCLE_VECTORS", target_flag())


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of a processor with such registers, whose instructions are functions."""
    folder = tmp_path_factory.mktemp("emulated")
    return compiled(folder, "-DLIFECYCLE_EMULATED", target_flag())


@pytest.fixture(scope="session", params=["processor", "emulated"])
def in_matrices(request: pytest.FixtureRequest) -> Path:
    """Libraries that use registers for matrices, the processor's where it has some."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return _of_processor()


@pytest.fixture(
    scope="session",
    params=["processor", "in_vectors", "emulated", "pairs", "avx2", "avx_vnni", "plain"],
)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as engines have it, and what other processors would make of it."""
    if request.param in ("in_vectors", "emulated"):
        return request.getfixturevalue(request.param)
    if request.param == "processor":
        return _of_processor()
    # Without VNNI the processor's own library adds pairs.
    needed = {"pairs": {"avx512_vnni"}, "avx2": {"avx2", "fma"}, "avx_vnni": {"avx_vnni"}}
    if missing := needed.get(request.param, set[str]()) - library.instruction_sets():
        pytest.skip(f"this processor has no {', '.join(missing)}")
    flags = {
        "plain": ["-DLIFECYCLE_PLAIN"],
        "pairs": ["-DLIFECYCLE_PAIRS", "-DLIFECYCLE_VECTORS", target_flag()],
        "avx2": ["-mavx2", "-mfma"],
        "avx_vnni": ["-mavx2", "-mfma", "-mavxvnni"],
    }
    return compiled(tmp_path_factory.mktemp(request.param), *flags[request.param])


def _of_processor() -> Path:
    found = library.kernels_for("native")
    assert found is not None
    return found


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Arrays,
    weights: Arrays,
    outputs: Arrays,
    widths: Mapping[str, int] | None = None,
) -> bytes:
    """A model of some nodes; the arrays of `inputs` and `outputs` say types and ranks, `widths` which of the inputs
    have a last dimension that is known."""

    def values(arrays: Arrays) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                name, _TYPES[array.dtype], [None] * (array.ndim - 1) + [(widths or {}).get(name)]
            )
            for name, array in arrays.items()
        ]

    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "test", values(inputs), values(outputs), initializers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in
              (("", 21), ("com.microsoft", 1), (DOMAIN, 1))]  # fmt: skip
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def run(
    model: bytes, kernels: Path | None, inputs: Arrays, threads: int = 2
) -> list[NDArray[np.float32]]:
    """What a model gives for some inputs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if kernels is not None:
        options.register_custom_ops_library(str(kernels))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))
