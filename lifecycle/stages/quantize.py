"""The stage `quantize`: an exported graph with its weights in fewer bits."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from lifecycle.errors import StageError
from lifecycle.kinds import Conversations, OnnxModel, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.stages.export import COMPANIONS

if TYPE_CHECKING:
    from lifecycle.graph.cache import QuantizedCache
    from lifecycle.graph.calibration import Calibration
    from lifecycle.graph.fold import Smoothing
    from lifecycle.graph.quantize import Quantized, Scheme

SchemeName = Literal["int8-rowwise", "int8", "int4", "fp16", "bf16", "fp32"]


def _known_scheme(value: Any) -> Any:
    known = get_args(SchemeName)
    if isinstance(value, str) and value not in known:
        raise ValueError(
            f"unknown scheme '{value}'{did_you_mean(value, known)} (known: {', '.join(known)})"
        )
    return value


class Quantize(Stage):
    """Store the matrices of a float32 graph as integers with scales or in 16 bits, and its cache of keys
    and values as integers."""

    produces = OnnxModel
    version: ClassVar[int] = 1

    model: Ref[OnnxModel]
    """An exported model in float32."""
    scheme: Annotated[SchemeName, BeforeValidator(_known_scheme)]
    """`int8-rowwise`: weights by output channel, activations by row; output that does not depend
    on the rest of the batch; best for batches and prefill. `int4`: weights in blocks; best
    for single streams of models that are larger than the processor's cache. `int8`: the same in
    8 bits. `fp16` and `bf16`: floats of 16 bits in the file, computed with in float32. `fp32`: as they
    are, for a graph of which only the cache changes."""
    kv_cache: Literal["int8", "int4"] | None = None
    """The type of the cache of keys and values, with scales measured on `calibration`; null leaves it
    in float32. `int8` takes a quarter of the memory and is faster where texts are long. `int4` takes
    an eighth and costs quality: hold it to gates."""
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
    smooth: float | None = Field(None, gt=0, le=1)
    """For `int8-rowwise`: how much of the spread of activations is moved into the weights of products
    that read a norm, as in SmoothQuant, measured on `calibration`; 0.5 is usual, null moves none. It
    helps models in which a few channels are much larger than the others."""
    calibration: Ref[Conversations | Text] | None = None
    """For `gptq`, `kv_cache` and `smooth`: texts like those that the model will see; their train split is read."""
    samples: int = Field(128, ge=1)
    """For `calibration`: how many texts are read."""
    sample_length: int = Field(512, ge=16)
    """For `calibration`: most tokens of a text."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.method == "gptq" and self.scheme not in ("int4", "int8"):
            raise ValueError(
                f"method: 'gptq' is for the schemes int4 and int8, not for {self.scheme}"
            )
        if self.scheme == "fp32" and self.kv_cache is None:
            raise ValueError("scheme: 'fp32' changes no weights; set kv_cache, or take a scheme")
        if self.smooth is not None and self.scheme != "int8-rowwise":
            raise ValueError(f"smooth is for the scheme int8-rowwise, not for {self.scheme}")
        readers = {
            "method: gptq": self.method == "gptq",
            "kv_cache": self.kv_cache is not None,
            "smooth": self.smooth is not None,
        }
        needed = next((name for name, reads in readers.items() if reads), None)
        if needed and self.calibration is None:
            raise ValueError(f"{needed} needs calibration: name the texts to measure on")
        if self.calibration and not needed:
            raise ValueError(
                f"calibration is only read for {' or '.join(readers)}; set one or leave it out"
            )
        return self

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx`, `model.onnx.data`, `decoder.json`; link the tokeniser files."""
        from lifecycle.engines.decoder import WEIGHTS, DecoderInfo
        from lifecycle.graph.check import check_graph

        model = ctx.input(self.model)
        info = DecoderInfo.load(model.path)
        if self.scheme != "fp32" and self.scheme not in info.schemes:
            raise StageError(
                f"scheme '{self.scheme}' does not run on target '{info.target}' "
                f"of '{self.model}' (it runs {', '.join(info.schemes) or 'none'})"
            )
        if self.kv_cache is not None and self.kv_cache not in info.kv_dtypes:
            raise StageError(
                f"kv_cache '{self.kv_cache}' does not run on target '{info.target}' "
                f"of '{self.model}' (it runs {', '.join(info.kv_dtypes)})"
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
        from lifecycle.graph.half import Half
        from lifecycle.graph.int8 import Int8Rowwise
        from lifecycle.graph.quantize import quantize_graph

        int8 = Int8Rowwise(self.weight_bits)
        exceptions: dict[str, Scheme | None] = dict.fromkeys(self.skip)
        scheme: Scheme | None = None
        match self.scheme:
            case "int8-rowwise":
                scheme = int8
            case "int8" | "int4":
                scheme = self._blockwise(ctx, source)
            case "fp16" | "bf16":
                scheme = Half(self.scheme)
            case "fp32":
                pass
        if self.scheme == "int4":
            exceptions |= dict.fromkeys(self.int8, int8)
        cache, smoothing = self._cache(ctx, source), self._smoothing(ctx, source)
        ctx.progress.phase("matrices")
        return quantize_graph(
            source,
            ctx.out,
            self.scheme,
            scheme,
            exceptions,
            ctx.progress.update,
            cache=cache,
            smoothing=smoothing,
        )

    def _cache(self, ctx: Context, source: Path) -> QuantizedCache | None:
        from lifecycle.engines.decoder import DecoderInfo
        from lifecycle.graph.cache import calibrate_cache

        if self.kv_cache is None:
            return None
        calibration = self._read_calibration(ctx, source)
        ctx.progress.phase("cache, layers")
        info = DecoderInfo.load(source)
        return calibrate_cache(calibration, info, self.kv_cache, ctx.progress.update)

    def _smoothing(self, ctx: Context, source: Path) -> Smoothing | None:
        from lifecycle.graph.fold import Smoothing

        if self.smooth is None:
            return None
        return Smoothing(self._read_calibration(ctx, source), self.smooth)

    def _blockwise(self, ctx: Context, source: Path) -> Scheme:
        from lifecycle.graph.blockwise import Blockwise
        from lifecycle.graph.gptq import Gptq

        bits = 4 if self.scheme == "int4" else 8
        if self.method == "rtn":
            return Blockwise(self.block_size, bits)
        return Gptq(self.block_size, self._read_calibration(ctx, source), bits)

    def _read_calibration(self, ctx: Context, source: Path) -> Calibration:
        from lifecycle.data.chat import ChatTokenizer
        from lifecycle.engines.decoder import DecoderInfo
        from lifecycle.evaluation.samples import ranked_rows, select, supervised, windows
        from lifecycle.graph.calibration import Calibration

        assert self.calibration is not None
        data, info = ctx.input(self.calibration), DecoderInfo.load(source)
        context = min(self.sample_length, info.long_context or info.max_position_embeddings)
        build = partial(windows, length=context) if isinstance(data, Text) else supervised
        name = self.calibration
        rows = ranked_rows(data, "train", name)
        found = select(rows, [ChatTokenizer.load(source)], build, context, self.samples)
        if len(found.items) < self.samples:
            raise StageError(
                f"calibration: '{name}' has {len(found.items)} texts of at most {context} tokens, "
                f"{self.samples} are asked for; set samples to {len(found.items)}, or give more "
                "data or a larger sample_length"
            )
        return Calibration(source, [sample.token_ids for (sample,) in found.items])
