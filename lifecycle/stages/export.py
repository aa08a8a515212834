"""The stage `export`: a Hugging Face model becomes an ONNX graph for a target."""

from __future__ import annotations

import time
from typing import ClassVar

from lifecycle.errors import StageError
from lifecycle.graph.targets import Cpu, Target
from lifecycle.kinds import HfModel, OnnxModel
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that go with a model unchanged, where it has them."""


class Export(Stage):
    """Write the graph of a decoder in float32, its weights streamed tensor by tensor."""

    produces = OnnxModel
    version: ClassVar[int] = 2

    model: Ref[HfModel]
    """A decoder without an adapter beside it; `docs/reference/architectures.md` lists those that
    are known."""
    target: Target = Cpu()
    """The hardware that the graph is made for."""

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx`, `model.onnx.data`, `decoder.json`; link the tokeniser files."""
        from lifecycle.engines.decoder import WEIGHTS
        from lifecycle.graph.check import check_graph
        from lifecycle.graph.export import export_decoder

        model = ctx.input(self.model)
        if model.adapter_path is not None:
            raise StageError(
                f"'{self.model}' has an adapter that is not part of its weights; "
                "merge it first: {use: merge, model: " + self.model + "}"
            )
        started = time.perf_counter()
        ctx.progress.phase("weights, bytes")
        info = export_decoder(model.path, ctx.out, self.target, ctx.progress.update)
        check_graph(ctx.out)
        for name in COMPANIONS:
            if (model.path / name).is_file():
                ctx.link(model.path / name)
        return {
            "architecture": info.architecture,
            "bytes": (ctx.out / WEIGHTS).stat().st_size,
            "seconds": round(time.perf_counter() - started, 3),
        }
