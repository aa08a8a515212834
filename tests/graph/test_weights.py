"""External data: aligned, of the promised size, and readable where the graph says it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lifecycle.graph.weights import ALIGNMENT, WeightFile


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
