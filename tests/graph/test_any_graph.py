"""Graphs that users bring: read with care, their matrices stored by every scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from lifecycle.errors import EngineError, StageError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.half import Half
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.ranges import Range
from lifecycle.graph.reading import find_graph, import_graph
from lifecycle.graph.rounding import Grid, least_squares, quantize
from lifecycle.graph.static import Int8Static
from lifecycle.pipeline.artifact import hash_tree
from tests.exact import WEIGHT_BITS
from tests.graph import graphs

IDS = np.random.default_rng(2).integers(0, 1024, (2, 7))
IMAGES = np.random.default_rng(3).standard_normal((4, 3, 12, 12)).astype(np.float32)


def run(folder: Path, **feeds: NDArray) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(folder / "model.onnx", options).run(None, feeds)[0]


def operators(folder: Path) -> dict[str, str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {node.name: node.op_type for node in graph.node}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An imported encoder."""
    source = graphs.write_encoder(tmp_path / "user" / "encoder.onnx", graphs.encoder_weights())
    out = tmp_path / "encoder"
    out.mkdir()
    import_graph(source, out)
    return out


def quantized(source: Path, scheme: Scheme, **options) -> Path:
    out = source.parent / f"{source.name}-{len(list(source.parent.iterdir()))}"
    out.mkdir()
    quantize_graph(source, out, "test", scheme, **options)
    return out


def test_an_imported_graph_computes_what_it_did(encoder: Path) -> None:
    wanted = graphs.run_encoder(graphs.encoder_weights(), IDS)
    assert np.allclose(run(encoder, ids=IDS), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("opset", [11, 13, 17, 22])
def test_older_graphs_are_converted(opset: int, tmp_path: Path) -> None:
    weights = graphs.classifier_weights()
    source = graphs.write_classifier(tmp_path / "old.onnx", weights, opset)
    out = tmp_path / "out"
    out.mkdir()
    model = import_graph(source, out)
    assert model.opset_imports[""] == max(opset, 18)
    assert np.allclose(run(out, image=IMAGES), graphs.run_classifier(weights, IMAGES), atol=1e-4)


def test_old_graphs_keep_their_external_weights(tmp_path: Path) -> None:
    weights = graphs.classifier_weights()
    source = graphs.write_classifier(tmp_path / "old.onnx", weights, 13)
    model = onnx.load(source)
    onnx.save(model, source, save_as_external_data=True, location="w", size_threshold=0)
    out = tmp_path / "out"
    out.mkdir()
    import_graph(source, out)
    assert np.allclose(run(out, image=IMAGES), graphs.run_classifier(weights, IMAGES), atol=1e-4)


def test_weights_in_4_bits_are_those_of_the_rounding(encoder: Path) -> None:
    """The three products have their weights as [in, out], transposed in the graph, and as
    [in, out] with an odd width."""
    weights = graphs.encoder_weights()
    out = quantized(encoder, Blockwise(32, 8))
    found = set(operators(out).values())
    assert found == {"Cast", "GatherBlockQuantized", "MatMulNBits", "Add", "Relu"}

    def rounded(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
        return quantize(matrix, Grid(32, 8), least_squares).floats(matrix.shape[1])

    weights |= {name: rounded(weights[name].T).T for name in ("w1", "w3")}
    weights |= {name: rounded(weights[name]) for name in ("table", "w2")}
    wanted = graphs.run_encoder(weights, IDS)
    # What remains is the activations' rounding.
    assert np.linalg.norm(run(out, ids=IDS) - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("scheme", "bound"), [(Int8Rowwise(WEIGHT_BITS), 0.03), (Blockwise(32, 4), 0.2)]
)
def test_quantised_graphs_stay_close(scheme: Scheme, bound: float, encoder: Path) -> None:
    wanted = graphs.run_encoder(graphs.encoder_weights(), IDS)
    one, two = quantized(encoder, scheme), quantized(encoder, scheme)
    assert np.linalg.norm(run(one, ids=IDS) - wanted) < bound * np.linalg.norm(wanted)
    assert hash_tree(one) == hash_tree(two)
    assert sum(e.size for e in hash_tree(one)) < 0.35 * sum(e.size for e in hash_tree(encoder))


def test_rows_do_not_feel_each_other(encoder: Path) -> None:
    out = quantized(encoder, Int8Rowwise(7))
    assert np.array_equal(run(out, ids=IDS)[:1], run(out, ids=IDS[:1]))


def test_skipped_matrices_stay(encoder: Path) -> None:
    found = operators(quantized(encoder, Blockwise(), exceptions={"down": None, "tok*": None}))
    assert (found["down"], found["tokens"]) == ("MatMul", "Gather")
    with pytest.raises(StageError, match="'dwn'; did you mean 'down'.*tokens, up, down, head"):
        quantized(encoder, Blockwise(), exceptions={"dwn": None})


def test_quantised_graphs_are_not_quantised_again(encoder: Path) -> None:
    once = quantized(encoder, Blockwise())
    with pytest.raises(StageError, match=r"quantised already"):
        quantized(once, Blockwise())


def test_custom_operators_are_named(tmp_path: Path) -> None:
    source = graphs.write_encoder(tmp_path / "m.onnx", graphs.encoder_weights())
    model = onnx.load(source)
    model.graph.node[3].domain = "my.ops"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    onnx.save(model, source)
    with pytest.raises(StageError, match=r"node 'relu' is my\.ops\.Relu.*not loaded"):
        import_graph(source, tmp_path)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "link.bin"])
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    source = graphs.write_encoder(folder / "m.onnx", graphs.encoder_weights())
    (tmp_path / "outside.bin").write_bytes((folder / "m.bin").read_bytes())
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = location
    source.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="outside its own folder"):
        import_graph(source, tmp_path)


def test_the_graph_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no \.onnx file"):
        find_graph(tmp_path)
    (tmp_path / "a.onnx").touch()
    assert find_graph(tmp_path).name == "a.onnx"
    (tmp_path / "b.onnx").touch()
    with pytest.raises(StageError, match=r"2 \.onnx files \(a\.onnx, b\.onnx\).*name the file"):
        find_graph(tmp_path)


def test_what_is_no_graph_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises((StageError, EngineError), match=r"m\.onnx is .*no ONNX graph"):
        import_graph(path, tmp_path)


def _import(tmp_path: Path, model: onnx.ModelProto) -> Path:
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    out = tmp_path / "imported"
    out.mkdir()
    import_graph(tmp_path / "m.onnx", out)
    return out


def _square(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    """A graph from x to y, [batch, 8] both."""
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8]) for name in "xy"
    )
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


SCHEMES = {
    "fp16": Half("fp16"),
    "int8": Int8Rowwise(WEIGHT_BITS),
    "blocks": Blockwise(16, 8),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_that_is_read_both_ways_round(scheme: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = random.standard_normal((8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "encode"),
        helper.make_node("Gemm", ["h", "w"], ["y"], "decode", transB=1),
    ]
    model = _import(tmp_path, _square(nodes, [onnx.numpy_helper.from_array(weights, "w")]))
    x = random.standard_normal((5, 8)).astype(np.float32)
    wanted = x @ weights @ weights.T
    found = run(quantized(model, SCHEMES[scheme]), x=x)
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("shape", [(), (1,), (1, 8), (8, 1), (8, 8)])
@pytest.mark.parametrize("scheme", [*SCHEMES, "static"])
def test_a_bias_of_any_form(scheme: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    constants = {"w": (8, 8), "b": shape}
    weights = {k: np.float32(random.standard_normal(s)) for k, s in constants.items()}
    stored = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "product")]
    model = _import(tmp_path, _square(nodes, stored))
    x = random.standard_normal((8, 8)).astype(np.float32)
    wanted = x @ weights["w"] + weights["b"]
    static = Int8Static(WEIGHT_BITS, {"x": Range.covering(float(x.min()), float(x.max()))})
    found = run(quantized(model, SCHEMES.get(scheme, static)), x=x)
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("dims", "offset"), [((2**40, 2**20), 0), ((8, 8), 0), ((8, 8), 10**30), ((-8, 8), 0)]
)
def test_weights_that_are_not_there_are_refused(
    dims: tuple[int, ...], offset: int, tmp_path: Path
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    weight = onnx.TensorProto(
        name="w", data_type=1, dims=dims, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "w.bin"), ("offset", str(offset))):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    model = _square([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], [weight])
    with pytest.raises(StageError, match="'w' of shape .* ends at byte"):
        _import(tmp_path, model)


@pytest.mark.parametrize(("depth", "message"), [(40, "stand for"), (0, "calls itself")])
def test_functions_that_never_end_are_refused(depth: int, message: str, tmp_path: Path) -> None:
    """Each calls the next one twice; or one calls itself."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("u", 1)]
    model = _square([helper.make_node("f0", ["x"], ["y"], domain="u")], [])
    model.opset_import.append(opsets[1])
    for i in range(max(depth, 1)):
        name, domain = ("Relu", "") if i == depth - 1 else (f"f{i + 1 if depth else 0}", "u")
        nodes = [helper.make_node(name, [a], [b], domain=domain) for a, b in ("xt", "ty")]
        model.functions.append(helper.make_function("u", f"f{i}", ["x"], ["y"], nodes, opsets))
    with pytest.raises(StageError, match=message):
        _import(tmp_path, model)
