"""The stage `quantize`: an exported graph with its weights in fewer bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from lifecycle.errors import StageError
from lifecycle.kinds import Arrays, Conversations, OnnxGraph, OnnxModel, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.stages.export import COMPANIONS

if TYPE_CHECKING:
    from lifecycle.graph.quantize import Quantized, Scheme

SchemeName = Literal["int8-rowwise", "int8", "int4", "int8-static"]


def _known_scheme(value: Any) -> Any:
    known = get_args(SchemeName)
    if isinstance(value, str) and value not in known:
        raise ValueError(
            f"unknown scheme '{value}'{did_you_mean(value, known)} (known: {', '.join(known)})"
        )
    return value


class Quantize(Stage):
    """Store the matrices of a float32 graph as integers with scales."""

    produces = OnnxGraph
    keeps_kind_of: ClassVar[str | None] = "model"
    version: ClassVar[int] = 1

    model: Ref[OnnxGraph]
    """A graph in float32: an exported decoder, or any that `onnx` brought in."""
    scheme: Annotated[SchemeName, BeforeValidator(_known_scheme)]
    """`int8-rowwise`: weights by output channel, activations by row; output that does not depend
    on the rest of the batch; best for batches and prefill. `int4`: weights in blocks; best
    for single streams of models that are larger than the processor's cache. `int8`: the same in
    8 bits. `int8-static`: weights by output channel, convolutions included, activations by tensor in
    ranges that `calibration` fixes; what networks of convolutions want."""
    skip: tuple[str, ...] = ()
    """Patterns of matrices that stay in float32, such as `lm_head`, `layers.0.*` or `*.experts`."""
    int8: tuple[str, ...] = ("lm_head",)
    """For `int4`: patterns of matrices that are stored as by `int8-rowwise`. The output head,
    and the embedding where it is the same matrix, suffers most from 4 bits; in small models
    `*.down_proj` is next."""
    block_size: Literal[16, 32, 64, 128] = 64
    """For `int4` and `int8`: how many weights share a scale. Smaller blocks are finer, larger ones are
    faster and take less memory."""
    weight_bits: Literal[7, 8] = 7
    """For `int8-rowwise`, also of parts of `int4`, and `int8-static`: bits used of each weight. 7 is right on every processor; 8 is a little finer, but
    overflows on x86 without VNNI instructions (`lifecycle doctor` shows them)."""
    method: Literal["rtn", "gptq"] = "rtn"
    """For `int4` and `int8`: how weights are rounded. `rtn`: each block by itself, to the least squared
    error. `gptq`: each layer by what it reads on `calibration`, to the least change of its
    output."""
    calibration: Ref[Conversations | Text | Arrays] | None = None
    """For `gptq` and `int8-static`: texts like those that a decoder will see, or `arrays` for any
    other graph; their train split is read."""
    samples: int = Field(128, ge=1)
    """Of `calibration`: how many samples are read."""
    sample_length: int = Field(512, ge=16)
    """Of `calibration`: most tokens of a text."""
    calibrate: Literal["minmax", "entropy", "percentile"] = "minmax"
    """For `int8-static`: what of a tensor's values 8 bits cover. `minmax`: all. `percentile`: all
    but the outermost. `entropy`: what keeps the distribution."""
    percentile: float = Field(99.99, gt=50, le=100)
    """For `calibrate: percentile`: the share of values that is covered."""

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.method == "gptq" and self.scheme not in ("int4", "int8"):
            raise ValueError(
                f"method: 'gptq' is for the schemes int4 and int8, not for {self.scheme}"
            )
        if self.scheme == "int8-static":
            if self.calibration is None:
                raise ValueError("scheme: int8-static fixes ranges on data; give calibration")
        elif (self.method == "gptq") != (self.calibration is not None):
            raise ValueError("method: gptq and calibration go together; give both or neither")
        return self

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx`, `model.onnx.data`, `decoder.json`; link the tokeniser files."""
        from lifecycle.engines.decoder import WEIGHTS
        from lifecycle.graph.check import check_graph

        model = ctx.input(self.model)
        self._require_possible(model)
        started = time.perf_counter()
        made = self._quantize(ctx, model.path)
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

    def _require_possible(self, model: OnnxGraph) -> None:
        from lifecycle.engines.decoder import DecoderInfo

        if isinstance(model, OnnxModel):
            info = DecoderInfo.load(model.path)
            if self.scheme not in info.schemes:
                raise StageError(
                    f"scheme '{self.scheme}' does not run on target '{info.target}' "
                    f"of '{self.model}' (it runs {', '.join(info.schemes) or 'none'})"
                )
        elif self.method == "gptq":
            raise StageError(
                f"method 'gptq' walks the layers of a decoder, but '{self.model}' is a graph of "
                "another kind: use method: rtn"
            )

    def _quantize(self, ctx: Context, source: Path) -> Quantized:
        from lifecycle.graph.int8 import Int8Rowwise
        from lifecycle.graph.quantize import quantize_graph

        int8 = Int8Rowwise(self.weight_bits)
        exceptions: dict[str, Scheme | None] = dict.fromkeys(self.skip)
        scheme: Scheme = int8
        if self.scheme == "int8-static":
            scheme = self._static(ctx, source)
        elif self.scheme != "int8-rowwise":
            scheme = self._blockwise(ctx, source)
        is_decoder = isinstance(ctx.input(self.model), OnnxModel)
        if self.scheme == "int4" and (is_decoder or "int8" in self.model_fields_set):
            # The default names a part that other graphs do not have.
            exceptions |= dict.fromkeys(self.int8, int8)
        ctx.progress.phase("matrices")
        return quantize_graph(source, ctx.out, self.scheme, scheme, exceptions, ctx.progress.update)

    def _blockwise(self, ctx: Context, source: Path) -> Scheme:
        from lifecycle.graph.blockwise import Blockwise
        from lifecycle.graph.gptq import Gptq

        bits = 4 if self.scheme == "int4" else 8
        if self.calibration is None:
            return Blockwise(self.block_size, bits)
        from lifecycle.evaluation.inputs import read_texts
        from lifecycle.graph.calibration import Calibration

        data = ctx.input(self.calibration)
        if isinstance(data, Arrays):
            raise StageError(f"method 'gptq' reads texts, but '{self.calibration}' is of arrays")
        texts = read_texts(
            source, data, self.calibration, count=self.samples, length=self.sample_length
        )
        return Gptq(self.block_size, Calibration(source, texts), bits)

    def _static(self, ctx: Context, source: Path) -> Scheme:
        from lifecycle.evaluation.inputs import read_inputs
        from lifecycle.graph.activations import histograms
        from lifecycle.graph.static import Int8Static, observed

        assert self.calibration is not None
        samples = read_inputs(
            ctx.input(self.model),
            ctx.input(self.calibration),
            self.calibration,
            count=self.samples,
            length=self.sample_length,
        )
        ctx.progress.phase("calibration")
        found = histograms(source, observed(source), samples, ctx.progress.update)
        ranges = {name: h.range(self.calibrate, self.percentile) for name, h in found.items()}
        return Int8Static(self.weight_bits, ranges)
