from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from lifecycle.engines.onnx_file import check_external_data
from lifecycle.errors import EngineError


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def in_initializer(tensor: TensorProto) -> onnx.ModelProto:
    inner = onnx.numpy_helper.from_array(np.ones(4, np.float32), "inner")
    return helper.make_model(helper.make_graph([], "g", [], [], [inner, tensor]))


def in_attribute(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["w"], value=tensor)
    return helper.make_model(helper.make_graph([node], "g", [], []))


def in_subgraph(tensor: TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph([], "then", [], [], [tensor])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return helper.make_model(helper.make_graph([node], "g", [], []))


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["w"], value=tensor)
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("own", "f", [], ["w"], [node], opset)
    return helper.make_model(helper.make_graph([], "g", [], []), functions=[function])


def write(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


PLACES = [in_initializer, in_attribute, in_subgraph, in_function]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "link"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, place, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    graph = write(folder, place(external(location)))
    with pytest.raises(EngineError, match="outside its own folder"):
        check_external_data(graph)


@pytest.mark.parametrize("place", PLACES)
def test_weights_beside_the_graph_are_fine(tmp_path: Path, place) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.data").write_bytes(bytes(16))
    check_external_data(write(tmp_path, place(external("weights/w.data"))))
    (tmp_path / "weights" / "w.data").unlink()
    with pytest.raises(EngineError, match=r"w\.data is missing"):
        check_external_data(tmp_path / "model.onnx")


@pytest.mark.parametrize("location", ["link", "linked/w.data", "./weights/../link"])
def test_weights_through_a_link_are_refused_wherever_it_leads(
    tmp_path: Path, location: str
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.data").write_bytes(bytes(16))
    (tmp_path / "link").symlink_to("weights/w.data")
    (tmp_path / "linked").symlink_to("weights")
    with pytest.raises(EngineError, match="through a link"):
        check_external_data(write(tmp_path, in_initializer(external(location))))


def test_a_folder_reached_by_a_link_is_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.data").write_bytes(bytes(16))
    write(folder, in_initializer(external("w.data")))
    (tmp_path / "link").symlink_to(folder)
    check_external_data(tmp_path / "link" / "model.onnx")


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"model\.onnx cannot be read: No such file"):
        check_external_data(tmp_path / "model.onnx")


@pytest.mark.parametrize("location", ["w\0", "w" * 300, "loop"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(EngineError, match="takes weights from"):
        check_external_data(write(tmp_path, in_initializer(external(location))))


def test_a_field_number_that_a_parser_would_cut_is_refused(tmp_path: Path) -> None:
    # Field 7 of the model, its graph, with bit 32 of the tag set as well.
    (tmp_path / "model.onnx").write_bytes(b"\xba\x80\x80\x80\x10\x00")
    with pytest.raises(EngineError, match="damaged"):
        check_external_data(tmp_path / "model.onnx")


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=80))
def test_any_bytes_are_either_read_or_called_damaged(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    graph = tmp_path_factory.getbasetemp() / "random.onnx"
    graph.write_bytes(data)
    try:
        check_external_data(graph)
    except EngineError as error:
        assert "random.onnx" in str(error)
