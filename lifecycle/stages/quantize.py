"""The stage `quantize`: an exported graph with its weights in fewer bits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from lifecycle.errors import StageError
from lifecycle.evaluation.front import Objective
from lifecycle.evaluation.gates import spelled_gates
from lifecycle.kinds import Conversations, OnnxModel, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.stages.candidates import CANDIDATES, check_search
from lifecycle.stages.export import COMPANIONS

if TYPE_CHECKING:
    from lifecycle.graph.calibration import Calibration
    from lifecycle.graph.quantize import Quantized, Scheme

SchemeName = Literal["int8-rowwise", "int8", "int4", "auto"]


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
    for single streams of models that are larger than the processor's cache. `int8`: the same in
    8 bits. `auto`: the best of several candidates, measured on this host, that holds `bound`."""
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
    """For `int8-rowwise`, also of parts of `int4`: bits used of each weight. 7 is right on every processor; 8 is a little finer, but
    overflows on x86 without VNNI instructions (`lifecycle doctor` shows them)."""
    method: Literal["rtn", "gptq"] = "rtn"
    """For `int4` and `int8`: how weights are rounded. `rtn`: each block by itself, to the least squared
    error. `gptq`: each layer by what it reads on `calibration`, to the least change of its
    output."""
    calibration: Ref[Conversations | Text] | None = None
    """For `gptq`: texts like those that the model will see; their train split is read."""
    samples: int = Field(128, ge=1)
    """For `gptq`: how many texts are read."""
    sample_length: int = Field(512, ge=16)
    """For `gptq`, and for measuring the candidates of `auto`: most tokens of a text."""
    bound: Annotated[dict[str, str], BeforeValidator(spelled_gates)] = Field(default={})
    """For `auto`: what the chosen model must hold, spelled as the gates of `evaluate` and measured
    beside the float32 model, such as `{perplexity_ratio: "<= 1.01"}` or `{kl: "<= 0.01", size:
    "<= 0.3"}`. At least one is about quality; the first of these is plotted, and decides between
    candidates that are as good by the objective."""
    objective: Objective = "latency"
    """For `auto`: what is best among those that hold. `latency`: tokens per second of one request;
    `throughput`: of `batch` requests that decode together; `size`: bytes of the weights."""
    batch: int = Field(8, ge=1, le=64)
    """For the objective `throughput`: requests that decode together."""
    data: Ref[Conversations | Text] | None = None
    """For `auto`: texts like those that the model will see. Candidates are measured on their test
    split; those that need calibration read their train split, or `calibration` where it is set."""
    candidates: tuple[str | dict[str, Any], ...] | None = None
    """For `auto`: what is tried, each a mapping with settings of this stage or just the name of a
    scheme; `float32` is the model as it is. Other settings of the stage hold for all of them.
    Null tries the usual ones, as far as model and target allow them."""
    eval_samples: int = Field(64, ge=1)
    """For `auto`: how many texts of the test split each candidate is measured on."""

    def fingerprint(self) -> Mapping[str, Any]:
        """The usual candidates, where they are what is tried."""
        is_usual = self.scheme == "auto" and self.candidates is None
        return {"candidates": list(CANDIDATES)} if is_usual else {}

    @model_validator(mode="after")
    def _search_fits(self) -> Self:
        check_search(self)
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.scheme == "auto":  # Each candidate is checked by itself.
            return self
        if self.method == "gptq" and self.scheme == "int8-rowwise":
            raise ValueError(
                "method: 'gptq' is for the schemes int4 and int8, not for int8-rowwise"
            )
        if (self.method == "gptq") != (self.calibration is not None):
            raise ValueError("method: gptq and calibration go together; give both or neither")
        return self

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx`, `model.onnx.data`, `decoder.json`; link the tokeniser files."""
        if self.scheme == "auto":
            from lifecycle.stages.search import search

            return search(self, ctx)
        from lifecycle.engines.decoder import WEIGHTS, DecoderInfo
        from lifecycle.graph.check import check_graph

        model = ctx.input(self.model)
        info = DecoderInfo.load(model.path)
        if self.scheme not in info.schemes:
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
        if self.scheme != "int8-rowwise":
            scheme = self._blockwise(ctx, source)
        if self.scheme == "int4":
            exceptions |= dict.fromkeys(self.int8, int8)
        ctx.progress.phase("matrices")
        return quantize_graph(source, ctx.out, self.scheme, scheme, exceptions, ctx.progress.update)

    def _blockwise(self, ctx: Context, source: Path) -> Scheme:
        from lifecycle.graph.blockwise import Blockwise
        from lifecycle.graph.gptq import Gptq

        bits = 4 if self.scheme == "int4" else 8
        if self.calibration is None:
            return Blockwise(self.block_size, bits)
        return Gptq(self.block_size, self._read_calibration(ctx, source, self.calibration), bits)

    def _read_calibration(self, ctx: Context, source: Path, name: str) -> Calibration:
        from lifecycle.data.chat import ChatTokenizer
        from lifecycle.engines.decoder import DecoderInfo
        from lifecycle.evaluation.samples import ranked_rows, select, supervised, windows
        from lifecycle.graph.calibration import Calibration

        assert self.calibration is not None
        data, info = ctx.input(self.calibration), DecoderInfo.load(source)
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
        return Calibration(source, [sample.token_ids for (sample,) in found.items])
