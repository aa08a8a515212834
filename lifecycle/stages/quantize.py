"""The stage `quantize`: an exported graph with its weights in fewer bits."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from lifecycle.errors import StageError
from lifecycle.kinds import Conversations, OnnxModel, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.registry import SETTINGS
from lifecycle.pipeline.stage import Context, Ref, Stage
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.stages.export import COMPANIONS

if TYPE_CHECKING:
    from lifecycle.graph.blockwise import Blockwise
    from lifecycle.graph.int8 import Int8Rowwise
    from lifecycle.graph.quantize import Quantized, Scheme

SchemeName = Literal["int8-rowwise", "int8", "int4", "mixed"]
_PARTS = {"mixed": ("int4", "int8-rowwise")}
"""Schemes that are made of others."""
SENSITIVITY = "sensitivity.json"


def _known_scheme(value: Any) -> Any:
    known = get_args(SchemeName)
    if isinstance(value, str) and value not in known:
        raise ValueError(
            f"unknown scheme '{value}'{did_you_mean(value, known)} (known: {', '.join(known)})"
        )
    return value


class Budget(BaseModel):
    """How far `mixed` may go; exactly one of the two."""

    model_config = SETTINGS

    bits_per_weight: float | None = Field(None, gt=0)
    """Most bits of a weight, over all quantised matrices, scales included."""
    kl: float | None = Field(None, gt=0)
    """Most that the predictions may diverge from those in float32, in nats per token, added up over what
    each matrix costs by itself with plain rounding."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.bits_per_weight is None) == (self.kl is None):
            raise ValueError("give either bits_per_weight or kl")
        return self


class Quantize(Stage):
    """Store the matrices of a float32 graph as integers with scales."""

    produces = OnnxModel
    version: ClassVar[int] = 1

    model: Ref[OnnxModel]
    """An exported model in float32."""
    scheme: Annotated[SchemeName, BeforeValidator(_known_scheme)]
    """`int8-rowwise`: weights by output channel, activations by row; output that does not depend
    on the rest of the batch; best for batches and prefill. `int4`: weights in blocks; best
    for single streams of models that are larger than the processor's cache. `int8`: the same in
    8 bits. `mixed`: each matrix as by `int4` or by `int8-rowwise`, by what 4 bits cost it on `calibration`."""
    budget: Budget | None = None
    """For `mixed`: `bits_per_weight`, or `kl`, the divergence of the predictions from float32 in nats per
    token. `sensitivity.json` beside the model says what was chosen for every matrix, and why."""
    skip: tuple[str, ...] = ()
    """Patterns of matrices that stay in float32, such as `lm_head`, `layers.0.*` or `*.experts`."""
    int8: tuple[str, ...] = ("lm_head",)
    """For `int4`: patterns of matrices that are stored as by `int8-rowwise`. The output head,
    and the embedding where it is the same matrix, suffers most from 4 bits; in small models
    `*.down_proj` is next."""
    block_size: Literal[16, 32, 64, 128] = 64
    """For `int4`, `int8` and `mixed`: how many weights share a scale. Smaller blocks are finer, larger ones are
    faster and take less memory."""
    weight_bits: Literal[7, 8] = 7
    """For `int8-rowwise`, also of parts of `int4` and `mixed`: bits used of each weight. 7 is right on every processor; 8 is a little finer, but
    overflows on x86 without VNNI instructions (`lifecycle doctor` shows them)."""
    method: Literal["rtn", "hqq", "awq", "gptq"] = "rtn"
    """For `int4`, `int8` and `mixed`: how weights are rounded. `rtn`: each block by itself, to the least squared
    error. `hqq`: each block by itself, its zero by half-quadratic steps. `awq`: as `rtn`,
    with the channels that carry much on `calibration` scaled up before. `gptq`: each layer by what
    it reads on `calibration`, to the least change of its output; the best."""
    symmetric: bool = True
    """For `int4`, `int8` and `mixed`: whether zero is the middle of every block, or a point of each block's
    own, which is finer and takes half a byte to a byte more per block. `hqq` needs `false`."""
    calibration: Ref[Conversations | Text] | None = None
    """For `awq`, `gptq` and `mixed`: texts like those that the model will see; their train split is read."""
    samples: int = Field(128, ge=1)
    """For `awq`, `gptq` and `mixed`: how many texts are read."""
    sample_length: int = Field(512, ge=16)
    """For `awq`, `gptq` and `mixed`: most tokens of a text."""

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.scheme == "int8-rowwise" and self.method != "rtn":
            raise ValueError(
                f"method: '{self.method}' is for the schemes int4, int8 and mixed, not for int8-rowwise"
            )
        if self.scheme == "int8-rowwise" and not self.symmetric:
            raise ValueError(
                "symmetric: false is for the schemes int4, int8 and mixed, not for int8-rowwise"
            )
        if self.method == "hqq" and self.symmetric:
            raise ValueError("method: hqq looks for zero points; set symmetric: false")
        if (self.scheme == "mixed") != (self.budget is not None):
            raise ValueError("scheme: mixed and budget go together; give both or neither")
        reader = "scheme: mixed" if self.scheme == "mixed" else f"method: {self.method}"
        needed = self.scheme == "mixed" or self.method in ("awq", "gptq")
        if needed and self.calibration is None:
            raise ValueError(f"{reader} needs calibration")
        if self.calibration is not None and not needed:
            raise ValueError(f"{reader} does not read calibration; leave it out")
        return self

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx`, `model.onnx.data`, `decoder.json`; link the tokeniser files."""
        from lifecycle.engines.decoder import WEIGHTS, DecoderInfo
        from lifecycle.graph.check import check_graph

        model = ctx.input(self.model)
        info = DecoderInfo.load(model.path)
        if not set(_PARTS.get(self.scheme, (self.scheme,))) <= set(info.schemes):
            raise StageError(
                f"scheme '{self.scheme}' does not run on target '{info.target}' "
                f"of '{self.model}' (it runs {', '.join(info.schemes) or 'none'})"
            )
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

    def _quantize(self, ctx: Context, source: Path) -> Quantized:
        from lifecycle.graph.int8 import Int8Rowwise
        from lifecycle.graph.quantize import quantize_graph

        int8 = Int8Rowwise(self.weight_bits)
        exceptions: dict[str, Scheme | None] = dict.fromkeys(self.skip)
        scheme: Scheme = int8
        if self.scheme == "int4":
            exceptions |= dict.fromkeys(self.int8, int8)
        with TemporaryDirectory(dir=ctx.scratch) as scratch:
            if self.scheme != "int8-rowwise":
                scheme = self._blockwise(ctx, source)
                if self.scheme == "mixed":
                    exceptions |= self._mix(ctx, source, Path(scratch), scheme, int8, exceptions)
                if self.method == "awq":
                    scaled = Path(scratch)
                    source = self._scale_channels(ctx, source, scaled, scheme, exceptions)
            ctx.progress.phase("matrices")
            return quantize_graph(
                source, ctx.out, self.scheme, scheme, exceptions, ctx.progress.update
            )

    def _mix(
        self,
        ctx: Context,
        source: Path,
        scratch: Path,
        coarse: Blockwise,
        fine: Int8Rowwise,
        exceptions: dict[str, Scheme | None],
    ) -> dict[str, Scheme | None]:
        """The matrices that stay in 8 bits; writes what was measured."""
        from lifecycle.graph.mixed import measure, save, within_bits, within_kl

        assert self.budget is not None
        texts = self._read_texts(ctx, source)
        ctx.progress.phase("sensitivity")
        measured = measure(source, scratch, texts, coarse, fine, exceptions, ctx.progress.update)
        if self.budget.bits_per_weight is not None:
            chosen = within_bits(measured, self.budget.bits_per_weight)
        else:
            chosen = within_kl(measured, self.budget.kl or 0)
        save(measured, chosen, ctx.out / SENSITIVITY)
        return dict.fromkeys((cost.name for cost in chosen), fine)

    def _blockwise(self, ctx: Context, source: Path) -> Blockwise:
        from lifecycle.graph import hqq
        from lifecycle.graph.blockwise import Blockwise
        from lifecycle.graph.calibration import Calibration
        from lifecycle.graph.gptq import Gptq
        from lifecycle.graph.rounding import least_squares

        grid = (self.block_size, 8 if self.scheme == "int8" else 4, self.symmetric)
        if self.method == "gptq":
            return Gptq(*grid, calibration=Calibration(source, self._read_texts(ctx, source)))
        return Blockwise(*grid, hqq.fit if self.method == "hqq" else least_squares)

    def _scale_channels(
        self,
        ctx: Context,
        source: Path,
        out: Path,
        scheme: Blockwise,
        exceptions: dict[str, Scheme | None],
    ) -> Path:
        from lifecycle.graph.awq import scale_channels
        from lifecycle.graph.calibration import Calibration

        calibration = Calibration(source, self._read_texts(ctx, source))
        ctx.progress.phase("channels")
        scale_channels(source, out, calibration, scheme, exceptions, ctx.progress.update)
        return out

    def _read_texts(self, ctx: Context, source: Path) -> list[tuple[int, ...]]:
        from lifecycle.data.chat import ChatTokenizer
        from lifecycle.engines.decoder import DecoderInfo
        from lifecycle.evaluation.samples import ranked_rows, select, supervised, windows

        name = self.calibration
        assert name is not None
        data, info = ctx.input(name), DecoderInfo.load(source)
        context = min(self.sample_length, info.long_context or info.max_position_embeddings)
        build = partial(windows, length=context) if isinstance(data, Text) else supervised
        rows = ranked_rows(data, "train", name)
        found = select(rows, [ChatTokenizer.load(source)], build, context, self.samples)
        if len(found.items) < self.samples:
            raise StageError(
                f"calibration: '{name}' has {len(found.items)} texts of at most {context} tokens, "
                f"{self.samples} are asked for; set samples to {len(found.items)}, or give more "
                "data or a larger sample_length"
            )
        return [sample.token_ids for (sample,) in found.items]
