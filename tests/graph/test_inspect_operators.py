"""Weights and work of all kinds of operators, wherever a model keeps its constants; figures are worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lifecycle.cli import main
from lifecycle.graph.inspect import Inspection, inspect_graph

FLOAT, MICROSOFT = TensorProto.FLOAT, "com.microsoft"
Ports = dict[str, tuple[int, list[int | str] | None]]


def constants(shapes: dict[str, tuple[int, ...]], kind: type = np.float32) -> list[TensorProto]:
    return [numpy_helper.from_array(np.ones(shape, kind), name) for name, shape in shapes.items()]


def port(name: str, kind: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def inspect(
    folder: Path,
    nodes: list[NodeProto],
    weights: list[TensorProto],
    inputs: Ports,
    functions: Sequence[onnx.FunctionProto] = (),
    kind: int = FLOAT,
) -> Inspection:
    """Of a model whose output is `y`."""
    ports = [port(name, *of) for name, of in inputs.items()]
    graph = helper.make_graph(nodes, "graph", ports, [port("y", kind, None)], weights)
    opsets = [
        helper.make_opsetid(domain, 21 if not domain else 1) for domain in ("", MICROSOFT, "own")
    ]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions)
    onnx.save(model, folder / "model.onnx")
    return inspect_graph(folder)


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrent_layer(operator: str, gates: int, tmp_path: Path) -> None:
    weights = constants({"w": (2, gates * 5, 3), "r": (2, gates * 5, 5), "b": (2, gates * 10)})
    node = helper.make_node(
        operator, ["x", "w", "r", "b"], ["", "y"], "layer", hidden_size=5, direction="bidirectional"
    )
    found = inspect(tmp_path, [node], weights, {"x": (FLOAT, ["S", "B", 3])})
    held = 2 * gates * 5 * (3 + 5)
    assert (found.parameters, found.others, found.bytes) == (
        held,
        20 * gates,
        4 * (held + 20 * gates),
    )
    assert found.multiply_adds == held
    assert found.total == {"B·S": held}
    assert [(m.precision, m.bytes) for m in found.matrices] == [("float32", found.bytes)]


def test_weights_put_together_when_the_model_runs(tmp_path: Path) -> None:
    """As exporters leave them whose folding has a limit: gates in another order, a dimension added."""
    weights = constants({"raw": (8, 3), "r": (1, 8, 2)})
    weights += [numpy_helper.from_array(np.array([at]), f"at{at}") for at in (0, 4, 8)]
    nodes = [
        helper.make_node("Slice", ["raw", "at0", "at4", "at0"], ["first"]),
        helper.make_node("Slice", ["raw", "at4", "at8", "at0"], ["second"]),
        helper.make_node("Concat", ["second", "first"], ["gates"], axis=0),
        helper.make_node("Unsqueeze", ["gates", "at0"], ["w"]),
        helper.make_node("LSTM", ["x", "w", "r"], ["", "y"], "layer", hidden_size=2),
    ]
    found = inspect(tmp_path, nodes, weights, {"x": (FLOAT, [7, 1, 3])})
    assert (found.parameters, found.multiply_adds, found.total) == (40, 40, {"": 7 * 40})


def test_weights_in_the_branches_of_an_if(tmp_path: Path) -> None:
    def branch(name: str, wide: int) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x", f"{name}.w"], [f"{name}.h"], f"{name}.product"),
            helper.make_node("MatMul", [f"{name}.h", f"{name}.c"], [f"{name}.y"], f"{name}.back"),
        ]
        back = constants({f"{name}.c": (wide, 4)}, np.float16)[0]
        nodes.insert(0, helper.make_node("Constant", [], [f"{name}.c"], value=back))
        return helper.make_graph(
            nodes, name, [], [port(f"{name}.y", FLOAT, None)], constants({f"{name}.w": (4, wide)})
        )

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("yes", 6), else_branch=branch("no", 2)
    )
    found = inspect(tmp_path, [node], [], {"c": (TensorProto.BOOL, []), "x": (FLOAT, ["n", 4])})
    assert (found.parameters, found.others) == (4 * 6 * 2 + 4 * 2 * 2, 0)
    assert found.bytes == (24 + 8) * 4 + (24 + 8) * 2
    assert found.multiply_adds == 64
    assert found.total is None
    assert {m.name: m.precision for m in found.matrices} == {
        "yes.product": "float32",
        "yes.back": "float16",
        "no.product": "float32",
        "no.back": "float16",
    }
    assert found.operators == {"MatMul": 4, "Constant": 2, "If": 1}


def test_constants_of_all_kinds_and_depths(tmp_path: Path) -> None:
    def branch(name: str, nodes: list[NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [port(name, FLOAT, None)])

    values = helper.make_node("Constant", [], ["inner"], value_floats=[1.0, 2.0, 3.0])
    same = helper.make_node("Identity", ["x"], ["outer"])
    inside = helper.make_node(
        "If",
        ["c"],
        ["deep"],
        then_branch=branch("inner", [values]),
        else_branch=branch("outer", [same]),
    )
    other = helper.make_node("Constant", [], ["flat"], value_float=1.0)
    nodes = [
        helper.make_node("Constant", [], ["word"], value_string="four"),
        helper.make_node(
            "If",
            ["c"],
            ["y"],
            then_branch=branch("deep", [inside]),
            else_branch=branch("flat", [other]),
        ),
    ]
    found = inspect(tmp_path, nodes, [], {"c": (TensorProto.BOOL, []), "x": (FLOAT, [3])})
    assert (found.parameters, found.others, found.bytes) == (0, 3 + 1 + 1, 12 + 4 + 4)


def test_weights_in_a_loop_and_around_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "inner"], ["h1"], "inside"),
            helper.make_node("MatMul", ["h1", "outer"], ["h2"], "shared"),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            port("i", TensorProto.INT64, []),
            port("go", TensorProto.BOOL, []),
            port("h", FLOAT, [2, 4]),
        ],
        [port("on", TensorProto.BOOL, []), port("h2", FLOAT, [2, 4])],
        constants({"inner": (4, 4)}),
    )
    nodes = [
        helper.make_node("MatMul", ["x", "outer"], ["start"], "before"),
        helper.make_node("Loop", ["turns", "", "start"], ["y"], body=body),
    ]
    inputs: Ports = {"x": (FLOAT, [2, 4]), "turns": (TensorProto.INT64, [])}
    found = inspect(tmp_path, nodes, constants({"outer": (4, 4)}), inputs)
    assert (found.parameters, found.bytes, found.multiply_adds) == (32, 128, 48)
    assert found.total is None
    assert main(["inspect", str(tmp_path)]) == 0
    assert "96 operations per row, a loop's per turn\n" in capsys.readouterr().out


MADE = {"ConvInteger": TensorProto.INT32, "MatMulInteger": TensorProto.INT32}
MADE |= {"QLinearConv": TensorProto.UINT8, "QLinearMatMul": TensorProto.UINT8}


@pytest.mark.parametrize(
    ("operator", "inputs", "places"),
    [
        ("Conv", ["floats", "w"], 7 * 5),
        ("ConvInteger", ["x", "w"], 7 * 5),
        ("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], 7 * 5),
        ("ConvTranspose", ["floats", "w"], 9 * 7),
    ],
)
def test_a_convolution(operator: str, inputs: list[str], places: int, tmp_path: Path) -> None:
    """Of 4 channels in 2 groups to 4 others, 3×3."""
    kind, letter = (np.float32, 4) if "floats" in inputs else (np.uint8, 1)
    weights = constants({"w": (4, 2, 3, 3)}, kind) + constants({"z": ()}, np.uint8)
    weights += constants({"s": ()})
    nodes = [helper.make_node(operator, inputs, ["y"], "layer", group=2)]
    ports: Ports = {"x": (TensorProto.UINT8, ["n", 4, 9, 7]), "floats": (FLOAT, ["n", 4, 9, 7])}
    found = inspect(tmp_path, nodes, weights, ports, kind=MADE.get(operator, FLOAT))
    assert (found.parameters, found.others, found.bytes) == (72, 2, 72 * letter + 5)
    assert found.multiply_adds == 72
    assert found.total == {"n": 72 * places}
    assert found.matrices[0].precision == ("float32" if letter == 4 else "uint8")


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        ("MatMulInteger", ["x", "w"]),
        ("QLinearMatMul", ["x", "s", "z", "w", "s", "zw", "s", "z"]),
    ],
)
def test_an_integer_product(operator: str, inputs: list[str], tmp_path: Path) -> None:
    weights = (
        constants({"w": (6, 5), "zw": ()}, np.int8)
        + constants({"z": ()}, np.uint8)
        + constants({"s": ()})
    )
    nodes = [helper.make_node(operator, inputs, ["y"], "layer")]
    ports: Ports = {"x": (TensorProto.UINT8, ["n", 3, 6])}
    found = inspect(tmp_path, nodes, weights, ports, kind=MADE[operator])
    assert (found.parameters, found.bytes, found.multiply_adds) == (30, 36, 30)
    assert found.total == {"n": 3 * 30}
    assert found.matrices[0].precision == "int8"
    assert found.matrices[0].bytes == (36 if operator == "QLinearMatMul" else 30)


def test_a_function_called_twice_holds_its_constants_once(tmp_path: Path) -> None:
    inner = constants({"value": (4, 4)}, np.float16)[0]
    function = helper.make_function(
        "own",
        "Twice",
        ["rows", "outer"],
        ["out"],
        [
            helper.make_node("Constant", [], ["inner"], value=inner),
            helper.make_node("MatMul", ["rows", "inner"], ["h"], "first"),
            helper.make_node("MatMul", ["h", "outer"], ["out"], "second"),
        ],
        [helper.make_opsetid("", 21)],
    )
    nodes = [
        helper.make_node("Twice", ["x", "a"], ["h"], "one", domain="own"),
        helper.make_node("Twice", ["h", "b"], ["y"], "two", domain="own"),
    ]
    weights = constants({"a": (4, 4), "b": (4, 4)})
    found = inspect(tmp_path, nodes, weights, {"x": (FLOAT, ["n", 4])}, [function])
    assert found.parameters == 16 + 16 + 16
    assert found.bytes == 16 * 2 + 2 * 16 * 4
    assert found.multiply_adds == 4 * 16
    assert found.total == {"n": 64}
    assert sorted(m.precision for m in found.matrices) == ["float16"] * 2 + ["float32"] * 2
    assert found.operators["MatMul"] == 4


def test_weights_through_nodes_that_change_their_form(tmp_path: Path) -> None:
    weights = constants({"w": (5, 6)}, np.int8) + constants({"s": (5,)})
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["floats"], axis=0),
        helper.make_node("Transpose", ["floats"], ["turned"]),
        helper.make_node("Cast", ["turned"], ["cast"], to=FLOAT),
        helper.make_node("Gemm", ["x", "cast"], ["y"], "layer"),
    ]
    found = inspect(tmp_path, nodes, weights, {"x": (FLOAT, ["n", 6])})
    layer = found.matrices[0]
    assert (layer.precision, layer.parameters, layer.bytes) == ("int8", 30, 30 + 20)
    assert found.total == {"n": 30}


def test_products_of_activations_are_in_the_total_only(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["q", "k"], ["y"])
    ports: Ports = {"q": (FLOAT, ["B", 8, "S", 16]), "k": (FLOAT, ["B", 8, 16, "P"])}
    found = inspect(tmp_path, [node], [], ports)
    assert (found.parameters, found.multiply_adds) == (0, 0)
    assert found.total == {"B·P·S": 8 * 16}


def attention_nodes() -> list[tuple[str, NodeProto, Ports, int]]:
    rows: list[int | str] = ["B", "S", 64]
    pairs: list[int | str] = ["B", "P", 32]
    microsoft = {"domain": MICROSOFT}
    return [
        (
            "grouped",
            helper.make_node(
                "GroupQueryAttention",
                ["q", "k", "v"],
                ["y"],
                num_heads=4,
                kv_num_heads=2,
                **microsoft,
            ),
            {"q": (FLOAT, rows), "k": (FLOAT, pairs), "v": (FLOAT, pairs)},
            2 * 64,
        ),
        (
            "grouped, packed",
            helper.make_node(
                "GroupQueryAttention", ["q"], ["y"], num_heads=4, kv_num_heads=2, **microsoft
            ),
            {"q": (FLOAT, ["B", "S", 128])},
            2 * 64,
        ),
        (
            "multi-head, other values",
            helper.make_node(
                "MultiHeadAttention", ["q", "k", "v"], ["y"], num_heads=4, **microsoft
            ),
            {"q": (FLOAT, rows), "k": (FLOAT, rows), "v": (FLOAT, pairs)},
            64 + 32,
        ),
        (
            "of ai.onnx",
            helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=2),
            {"q": (FLOAT, rows), "k": (FLOAT, pairs), "v": (FLOAT, pairs)},
            2 * 64,
        ),
    ]


@pytest.mark.parametrize(("node", "inputs", "width"), [case[1:] for case in attention_nodes()])
def test_attention_is_work_per_row_and_position(
    node: NodeProto, inputs: Ports, width: int, tmp_path: Path
) -> None:
    found = inspect(tmp_path, [node], [], inputs)
    assert found.attention == width
    assert found.total == ({"B·P·S": width} if not node.domain else None)


def test_attention_with_its_own_weights(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["x", "w"], ["y"], num_heads=4, domain=MICROSOFT)
    found = inspect(tmp_path, [node], constants({"w": (16, 48)}), {"x": (FLOAT, ["B", "S", 16])})
    assert (found.parameters, found.multiply_adds, found.attention) == (768, 768, 32)


def test_attention_of_unknown_shape_is_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node(
        "MultiHeadAttention", ["q", "q", "q"], ["y"], num_heads=4, domain=MICROSOFT
    )
    assert inspect(tmp_path, [node], [], {"q": (FLOAT, None)}).attention is None
    assert main(["inspect", str(tmp_path)]) == 0
    assert "attention: operations not known" in capsys.readouterr().out


def test_the_sum_of_a_run_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "rows"),
        helper.make_node("MatMul", ["few", "w"], ["y"], "few"),
    ]
    ports: Ports = {"x": (FLOAT, ["n", 500]), "few": (FLOAT, [3, 500])}
    inspect(tmp_path, nodes, constants({"w": (500, 2)}), ports)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1,000 parameters, 4,000 bytes (32.00 bits each); 4,000 operations per row\n" in shown
    assert "one run: 2,000·n + 6,000 operations" in shown
