"""A graph whose weights are elsewhere, cut off or invalid does not pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from lifecycle.errors import StageError
from lifecycle.graph.check import check_graph


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(tiny, tmp_path / "copy")


def test_an_export_passes(folder: Path) -> None:
    check_graph(folder)


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/hostname", "absent.data"])
def test_weights_elsewhere_are_refused(location: str, folder: Path) -> None:
    def move(model: onnx.ModelProto) -> None:
        entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
        next(entry for entry in entries if entry.key == "location").value = location

    _edit(folder, move)
    with pytest.raises(StageError, match="no plain file of the same folder"):
        check_graph(folder)


def test_a_link_is_no_plain_file(folder: Path) -> None:
    data = folder / "model.onnx.data"
    shutil.move(data, folder / "real.data")
    data.symlink_to("real.data")
    with pytest.raises(StageError, match="no plain file"):
        check_graph(folder)


def test_cut_weights_are_refused(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(StageError, match="ends before"):
        check_graph(folder)


def test_an_invalid_graph_is_refused(folder: Path) -> None:
    def break_node(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "Reshapes"

    _edit(folder, break_node)
    with pytest.raises(StageError, match="no valid graph"):
        check_graph(folder)


def _edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
