"""The stage `onnx`: any ONNX model that a user brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lifecycle.kinds import OnnxGraph
from lifecycle.pipeline.artifact import Metrics, hash_file
from lifecycle.pipeline.stage import Context, SourcePath, Stage


class Onnx(Stage):
    """Take an ONNX model of any kind: an encoder, a classifier, a convolutional network.

    It is checked first: its weights must lie in its own folder, its operators must be those of
    ONNX Runtime, and it must load there. No library is loaded and no code is run. Graphs of
    operator sets before 18 are converted.
    """

    produces = OnnxGraph
    version: ClassVar[int] = 1

    path: SourcePath
    """An `.onnx` file, or a folder with one; of several `model.onnx` is taken."""

    def fingerprint(self) -> Mapping[str, Any]:
        """The files that hold the weights: the key of `path` covers them only in a folder."""
        from lifecycle.engines.onnx_file import check_external_data
        from lifecycle.graph.reading import find_graph

        if self.path.is_dir():
            return {}
        return {
            f"weights.{name}": hash_file(self.path.parent / name)
            for name in check_external_data(find_graph(self.path))
        }

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx` and `model.onnx.data`."""
        from lifecycle.engines.decoder import GRAPH, WEIGHTS
        from lifecycle.engines.ort_session import open_session
        from lifecycle.graph.check import check_graph
        from lifecycle.graph.reading import find_graph, import_graph

        ctx.progress.phase("reading")
        model = import_graph(find_graph(self.path), ctx.out)
        check_graph(ctx.out)
        ctx.progress.phase("loading in ONNX Runtime")
        session = open_session(ctx.out / GRAPH, ("CPUExecutionProvider",))
        return {
            "opset": model.opset_imports[""],
            "nodes": len(list(model.graph)),
            "inputs": [value.name for value in session.get_inputs()],
            "outputs": [value.name for value in session.get_outputs()],
            "bytes": (ctx.out / WEIGHTS).stat().st_size,
        }
