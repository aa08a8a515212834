"""External data: aligned, of the promised size, and readable where the graph says it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from lifecycle.errors import CheckpointError
from lifecycle.graph.checkpoint import Checkpoint
from lifecycle.graph.weights import ALIGNMENT, WeightFile, copy_tensor


def test_tensors_lie_aligned_one_after_another(tmp_path: Path) -> None:
    arrays = [np.arange(5, dtype=np.float32), np.ones((2, 3), np.int8), np.ones(0, np.uint8)]
    sizes: list[int] = []
    with WeightFile(tmp_path / "data", sizes.append) as file:
        values = [file.add_array(str(i), array) for i, array in enumerate(arrays)]
    assert sizes == [20, ALIGNMENT + 6, 2 * ALIGNMENT]
    for value, array in zip(values, arrays, strict=True):
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert (tensor.offset or 0) % ALIGNMENT == 0
        if array.size:
            assert np.array_equal(tensor.numpy(), array)


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "data") as file, pytest.raises(ValueError, match="8 bytes written"):
        file.add("w", ir.DataType.FLOAT, (3,), [np.ones(2, np.float32)])


def test_sources_are_joined_along_their_rows(tmp_path: Path) -> None:
    parts = {"q": torch.randn(4, 3), "k": torch.randn(2, 3)}
    save_file(parts, tmp_path / "model.safetensors")
    with WeightFile(tmp_path / "data") as file:
        value = copy_tensor(Checkpoint(tmp_path), ["q", "k"], file, "qk", (6, 3))
    assert value.const_value is not None
    assert np.array_equal(value.const_value.numpy(), torch.cat([parts["q"], parts["k"]]).numpy())


def test_sources_of_another_shape_are_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    with (
        WeightFile(tmp_path / "data") as file,
        pytest.raises(CheckpointError, match=r"w \[4, 3\].*asks for \[3, 4\]"),
    ):
        copy_tensor(Checkpoint(tmp_path), ["w"], file, "w", (3, 4))
