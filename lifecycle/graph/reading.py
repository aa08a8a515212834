"""Any ONNX graph: read with care, and brought into the one form that the project stores."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from google.protobuf.message import DecodeError
from onnx_ir.serde import SerdeError

from lifecycle.engines.decoder import GRAPH, WEIGHTS
from lifecycle.engines.onnx_file import check_external_data
from lifecycle.errors import StageError
from lifecycle.graph.nodes import MICROSOFT, save_model
from lifecycle.graph.weights import WeightFile, move_weights

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", MICROSOFT)
"""Operators that ONNX Runtime brings itself."""
_MOST_NODES = 1_000_000
"""With all functions inlined."""
_OPSET = 18
"""The oldest in which the nodes of all schemes can be written; older graphs are converted to it."""


def find_graph(path: Path) -> Path:
    """The .onnx file that a path means: itself, or the only one in a folder.

    Raises:
        StageError: there is none, or there are several and none is called `model.onnx`.
    """
    if not path.is_dir():
        return path
    found = sorted(file.name for file in path.glob("*.onnx"))
    if GRAPH in found:
        return path / GRAPH
    if len(found) != 1:
        what = f"{len(found)} .onnx files ({', '.join(found)})" if found else "no .onnx file"
        raise StageError(f"{path} has {what} and no {GRAPH}: name the file")
    return path / found[0]


def read_model(file: Path) -> ir.Model:
    """Read a graph; its external weights are checked, not read.

    Raises:
        EngineError: its weights are missing or lie outside its folder, or it is over 2 GiB.
        StageError: it is no ONNX graph.
    """
    check_external_data(file)
    try:
        return ir.load(file)
    except (DecodeError, SerdeError, ValueError, TypeError, AttributeError, KeyError) as error:
        cause = error.__cause__ or error
        raise StageError(f"{file} is no ONNX graph: {cause}") from error


def import_graph(file: Path, out: Path) -> ir.Model:
    """Write a graph to `out` as `model.onnx` and `model.onnx.data`.

    Functions are inlined, constants become initializers, nodes get names of their own, what
    leads to no output is dropped, and a graph of an operator set before 18 is converted to it.
    Weights are copied block by block.

    Raises:
        EngineError, StageError: as `read_model`; it has operators of unknown domains, or of a set
            that cannot be converted.
    """
    model = read_model(file)
    _require_known_operators(file, model)
    require_few_nodes(file, model)
    opset = model.opset_imports.get("", _OPSET)
    if opset < _OPSET:
        model = _convert(file, opset)
    for change in (
        passes.InlinePass(),
        passes.LiftConstantsToInitializersPass(),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.RemoveInitializersFromInputsPass(),
        passes.RemoveUnusedNodesPass(),
        passes.NameFixPass(),
    ):
        change(model)
    _require_whole(file, model.graph)
    try:
        with WeightFile(out / WEIGHTS) as weights:
            move_weights(model.graph, weights)
    except ValueError as error:
        raise StageError(f"{file} has a damaged constant: {error}") from error
    save_model(model.graph, out / GRAPH, model.ir_version)
    return model


def _require_known_operators(file: Path, model: ir.Model) -> None:
    own = {(function.domain, function.name) for function in model.functions.values()}
    for node in model.graph.all_nodes():
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own:
            raise StageError(
                f"{file}: node '{node.name}' is {node.domain}.{node.op_type}, which ONNX Runtime "
                "does not have; libraries with operators are not loaded, so export the model "
                "with standard operators"
            )


def require_few_nodes(file: Path, model: ir.Model) -> None:
    """Functions that call functions can stand for more nodes than any machine holds.

    Raises:
        StageError: they do, or one calls itself.
    """
    functions = {(f.domain, f.name): f for f in model.functions.values()}
    sizes: dict[tuple[str, str], int] = {}
    open_ones: set[tuple[str, str]] = set()

    def size(nodes: Iterable[ir.Node]) -> int:
        return sum(size_of(node.domain, node.op_type) for node in nodes)

    def size_of(*name: str) -> int:
        key = (name[0], name[1])
        if key not in functions:
            return 1
        if key in open_ones:
            raise StageError(f"{file}: the function {'.'.join(name)} calls itself")
        if key not in sizes:
            open_ones.add(key)
            sizes[key] = size(functions[key].all_nodes())
            open_ones.remove(key)
        return sizes[key]

    try:
        count = size(model.graph.all_nodes())
    except RecursionError:
        raise StageError(f"{file}: its functions call each other too deeply") from None
    if count > _MOST_NODES:
        raise StageError(
            f"{file}: its functions stand for {count} nodes, of which {_MOST_NODES} are read at most"
        )


def _require_whole(file: Path, graph: ir.Graph) -> None:
    """The bytes of constants in other files must be there, so that copying them has an end."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        shape, start = tensor.shape.numpy(), tensor.offset or 0
        end = start + -(-prod(shape) * tensor.dtype.bitwidth // 8)
        size = Path(tensor.path).stat().st_size
        if min((*shape, start)) < 0 or end > size:
            raise StageError(
                f"{file}: the constant '{name}' of shape {list(shape)} ends at byte {end} of its "
                f"file, which has {size}; save the model again"
            )


def _convert(file: Path, opset: int) -> ir.Model:
    """The graph in operator set 18; onnx converts it without its external weights."""
    from onnx import version_converter

    proto = onnx.load(file, load_external_data=False)
    try:
        converted = version_converter.convert_version(proto, _OPSET)
        model = ir.from_proto(converted)
    except Exception as error:
        raise StageError(
            f"{file} is of operator set {opset} and cannot be converted to {_OPSET} ({error}): "
            f"export it again with opset_version={_OPSET} or higher"
        ) from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = file.parent
    return model
