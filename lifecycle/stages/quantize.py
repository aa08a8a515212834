"""The stage `quantize`: an exported graph with its weights in fewer bits."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator

from lifecycle.errors import StageError
from lifecycle.kinds import OnnxModel
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.stages.export import COMPANIONS

SchemeName = Literal["int8-rowwise", "int4"]


def _known_scheme(value: Any) -> Any:
    known = get_args(SchemeName)
    if isinstance(value, str) and value not in known:
        raise ValueError(
            f"unknown scheme '{value}'{did_you_mean(value, known)} (known: {', '.join(known)})"
        )
    return value


class Quantize(Stage):
    """Store the matrices of a float32 graph as integers with scales."""

    produces = OnnxModel
    version: ClassVar[int] = 1

    model: Ref[OnnxModel]
    """An exported model in float32."""
    scheme: Annotated[SchemeName, BeforeValidator(_known_scheme)]
    """`int8-rowwise`: weights by output channel, activations by row; output that does not depend
    on the rest of the batch; best for batches and prefill. `int4`: weights in blocks; best
    for single streams of models that are larger than the processor's cache."""
    skip: tuple[str, ...] = ()
    """Patterns of matrices that stay in float32, such as `lm_head` or `layers.0.*`."""
    int8: tuple[str, ...] = ("lm_head",)
    """For `int4`: patterns of matrices that are stored as by `int8-rowwise`. The output head,
    and the embedding where it is the same matrix, suffers most from 4 bits; in small models
    `*.down_proj` is next."""
    block_size: Literal[16, 32, 64, 128] = 64
    """For `int4`: how many weights share a scale. Smaller blocks are finer, larger ones are
    faster and take less memory."""
    weight_bits: Literal[7, 8] = 7
    """Bits used of each int8 weight. 7 is right on every processor; 8 is a little finer, but
    overflows on x86 without VNNI instructions (`lifecycle doctor` shows them)."""

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx`, `model.onnx.data`, `decoder.json`; link the tokeniser files."""
        from lifecycle.engines.decoder import WEIGHTS, DecoderInfo
        from lifecycle.graph.check import check_graph
        from lifecycle.graph.int4 import Int4
        from lifecycle.graph.int8 import Int8Rowwise
        from lifecycle.graph.quantize import Scheme, quantize_graph

        model = ctx.input(self.model)
        info = DecoderInfo.load(model.path)
        if self.scheme not in info.schemes:
            raise StageError(
                f"scheme '{self.scheme}' does not run on target '{info.target}' "
                f"of '{self.model}' (it runs {', '.join(info.schemes) or 'none'})"
            )
        started = time.perf_counter()
        ctx.progress.phase("matrices")
        int8 = Int8Rowwise(self.weight_bits)
        exceptions: dict[str, Scheme | None] = dict.fromkeys(self.skip)
        if self.scheme == "int4":
            exceptions |= dict.fromkeys(self.int8, int8)
        made = quantize_graph(
            model.path,
            ctx.out,
            self.scheme,
            Int4(self.block_size) if self.scheme == "int4" else int8,
            exceptions,
            ctx.progress.update,
        )
        check_graph(ctx.out)
        for name in COMPANIONS:
            if (model.path / name).is_file():
                ctx.link(model.path / name)
        return {
            "bytes": made.bytes,
            "bits_per_weight": made.bits_per_weight,
            "ratio": round(made.bytes / (model.path / WEIGHTS).stat().st_size, 4),
            "seconds": round(time.perf_counter() - started, 3),
        }
