"""What must hold of any graph folder before it becomes an artifact."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from lifecycle.engines.adapters import GRAPH as ADAPTED
from lifecycle.engines.decoder import GRAPH, HIDDEN_GRAPH, PREFILL_GRAPH
from lifecycle.errors import StageError


def check_graph(folder: Path) -> None:
    """Check `model.onnx`, and the other graphs of a decoder that are there: valid ONNX, and all their
    weights whole and inside the folder.

    Numbers are the business of others: the checkpoint reader refuses weights that are not
    finite, and `evaluate` compares outputs.

    Raises:
        StageError: names the file and what is wrong with it.
    """
    for name in (GRAPH, ADAPTED, HIDDEN_GRAPH, PREFILL_GRAPH):
        if name == GRAPH or (folder / name).is_file():
            _check_file(folder / name)


def _check_file(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(path, tensor)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise StageError(f"{path} is no valid graph: {error}") from error


def _check_external(path: Path, tensor: TensorProto) -> None:
    """Its bytes must lie in a plain file of the folder (see CVE-2024-27318 and its successors)."""
    where = ExternalDataInfo(tensor)
    file = path.parent / where.location
    if Path(where.location).name != where.location or file.is_symlink() or not file.is_file():
        raise StageError(
            f"{path}: the data of {tensor.name} is at '{where.location}', "
            "which is no plain file of the same folder"
        )
    end = (where.offset or 0) + (where.length or 0)
    if end > file.stat().st_size:
        raise StageError(f"{file} ends before {tensor.name}: {file.stat().st_size} of {end} bytes")
