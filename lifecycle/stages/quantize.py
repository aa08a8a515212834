"""The stage `quantize`: a float32 graph with its weights in fewer bits."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from lifecycle.errors import StageError
from lifecycle.evaluation.front import Objective
from lifecycle.evaluation.gates import spelled_gates
from lifecycle.kinds import Arrays, Conversations, OnnxGraph, OnnxModel, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.registry import SETTINGS
from lifecycle.pipeline.stage import RUNTIME, Context, Ref, Stage
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.stages.candidates import CANDIDATES, ONLY_FOR, check_search
from lifecycle.stages.export import COMPANIONS

SchemeName = Literal[
    "int8-rowwise", "int8", "int4", "mixed", "int8-static", "fp16", "bf16", "fp32", "auto"
]
_PARTS = {"mixed": ("int4", "int8-rowwise")}
"""Schemes that are made of others."""


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
    each matrix costs by itself, rounded by `method` (for `awq` as by `rtn`)."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.bits_per_weight is None) == (self.kl is None):
            raise ValueError("give either bits_per_weight or kl")
        return self


class Distill(BaseModel):
    """How a rounded model is trained to say what the model in float32 says."""

    model_config = SETTINGS

    steps: int = Field(2000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(8, ge=1)
    """Texts of `calibration` per step, each of `sample_length` tokens at most."""
    learning_rate: float = Field(1e-4, gt=0)
    """The highest one, of a cosine with a short warm-up: about so much a weight moves in a step."""
    samples: int | None = Field(None, ge=2)
    """Of `calibration`: how many texts are trained on, whatever the stage's `samples` are; null takes all. The last ones
    are held out, to see what was gained: take more than the stage's `samples`, which the method is fitted to."""
    seed: int = Field(0, ge=0)
    """Of the order of the texts."""


class Quantize(Stage):
    """Store the matrices of a float32 graph as integers with scales or in 16 bits, and a decoder's cache
    of keys and values as integers."""

    produces = OnnxGraph
    keeps_kind_of: ClassVar[str | None] = "model"
    version: ClassVar[int] = 7

    model: Ref[OnnxGraph]
    """A graph in float32: an exported decoder, or any that `onnx` brought in."""
    scheme: Annotated[SchemeName, BeforeValidator(_known_scheme)]
    """`int8-rowwise`: weights by output channel, activations by row; output that does not depend
    on the rest of the batch; best for batches and prefill. `int4`: weights in blocks; best
    for single streams of models that are larger than the processor's cache. `int8`: the same in
    8 bits. `mixed`: each matrix as by `int4` or by `int8-rowwise`, by what 4 bits cost it on
    `calibration`; the experts of mixtures all as by `int4`. `int8-static`: weights by output channel,
    convolutions included, activations by tensor in ranges that `calibration` fixes; what networks of
    convolutions want. `fp16` and `bf16`: floats of 16 bits in the file, computed with in float32. `fp32`: as they are, for a graph of which only the cache
    changes. `auto`: the best of several candidates, measured on this host, that holds `bound`."""
    budget: Budget | None = None
    """For `mixed`: `bits_per_weight`, or `kl`, the divergence of the predictions from float32 in nats per
    token. `sensitivity.json` beside the model says what was chosen for every matrix, and why."""
    kv_cache: Literal["int8", "int4"] | None = None
    """The type of a decoder's cache of keys and values, with scales measured on `calibration`; null leaves
    it in float32. `int8` takes a quarter of the memory and is faster where texts are long. `int4` takes an
    eighth and costs quality: hold it to gates."""
    skip: tuple[str, ...] = ()
    """Patterns of matrices that stay in float32, such as `lm_head`, `layers.0.*` or `*.experts`."""
    int8: tuple[str, ...] = ("lm_head",)
    """For `int4`: patterns of matrices that are stored as by `int8-rowwise`. The output head,
    and the embedding where it is the same matrix, suffers most from 4 bits; in small models
    `*.down_proj` is next."""
    block_size: Literal[16, 32, 64, 128] = 64
    """For `int4`, `int8` and `mixed`: how many weights share a scale. Smaller blocks are finer, larger
    ones are faster and take less memory."""
    weight_bits: Literal[7, 8] | None = None
    """For `int8-rowwise`, also of parts of `int4` and `mixed`, and `int8-static`: bits used of each
    weight. 7 is right on every processor; 8 is a little finer, but on x86 without VNNI instructions
    (`lifecycle doctor` shows them) overflows in ONNX Runtime's kernels and takes longer in an engine's own. Null takes 8
    where this host has them, and 7 elsewhere: set 7 for models that other hosts run too."""
    method: Literal["rtn", "hqq", "awq", "gptq"] = "rtn"
    """For `int4`, `int8` and `mixed`: how weights are rounded. `rtn`: each block by itself, to the least
    squared error. `hqq`: each block by itself, its zero by half-quadratic steps. `awq`: as `rtn`,
    with the channels that carry much on `calibration` scaled up before. `gptq`: each product by what
    it reads on `calibration`, to the least change of its output, the errors of those before it made up
    for; the best. The experts of a mixture count by the tokens that visit them: few say little, and those
    that none visits are rounded as by `rtn`."""
    distill: Distill | None = None
    """For `int4` and `mixed`: train the rounded weights, with norms and biases, against the divergence of the
    predictions from float32 on `calibration`, such as `{steps: 2000}`. The best that few bits can be; takes a training's
    time, and its memory: some 40 bytes per weight. `distillation.json` beside the model says what was gained, with
    activations in float32."""
    device: Annotated[str, RUNTIME] = "auto"
    """For `distill`: `cpu`, `cuda:1`, …; `auto` is the accelerator of the host if there is one."""
    symmetric: bool = True
    """For `int4`, `int8` and `mixed`: whether zero is the middle of every block, or a point of each block's
    own, which is finer and takes half a byte to a byte more per block. `hqq` needs `false`."""
    smooth: float | None = Field(None, gt=0, le=1)
    """For `int8-rowwise`: how much of the spread of activations is moved into the weights of products
    that read a norm, as in SmoothQuant, measured on `calibration`; 0.5 is usual, null moves none. It
    helps models in which a few channels are much larger than the others."""
    calibration: Ref[Conversations | Text | Arrays] | None = None
    """Of `awq`, `gptq`, `mixed`, `distill`, `int8-static`, `kv_cache` and `smooth`: texts like those that a decoder will see, or `arrays` for
    any other graph; their train split is read."""
    samples: int = Field(128, ge=1)
    """Of `calibration`: how many samples are read."""
    sample_length: int = Field(512, ge=16)
    """Of `calibration`, and for measuring the candidates of `auto`: most tokens of a text."""
    calibrate: Literal["minmax", "entropy", "percentile"] = "minmax"
    """For `int8-static`: what of a tensor's values 8 bits cover. `minmax`: all. `percentile`: all
    but the outermost. `entropy`: what keeps the distribution."""
    percentile: float = Field(99.99, gt=50, le=100)
    """For `calibrate: percentile`: the share of values that is covered."""

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
        """The usual candidates, where they are what is tried, and the bits that the host chooses."""
        found: dict[str, Any] = {}
        if self.scheme == "auto" and self.candidates is None:
            found["candidates"] = list(CANDIDATES)
        if self.weight_bits is None and self.scheme in ("auto", *ONLY_FOR["weight_bits"]):
            found["weight_bits"] = self.bits_here
        return found

    @property
    def bits_here(self) -> int:
        """`weight_bits`, or what is best on this host."""
        from lifecycle.engines.native.library import adds_bytes_exactly

        return self.weight_bits or (8 if adds_bytes_exactly() else 7)

    @model_validator(mode="after")
    def _search_fits(self) -> Self:
        if self.scheme == "auto" and self.distill is not None:
            raise ValueError("distill is not for all candidates: give it to those that it is for")
        check_search(self)
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.scheme == "auto":  # Each candidate is checked by itself.
            return self
        for name, schemes in ONLY_FOR.items():
            value = getattr(self, name)
            is_set = value != type(self).model_fields[name].default
            # Who asks for blocks expects some, also of the usual size.
            is_set |= name == "block_size" and name in self.model_fields_set
            if is_set and self.scheme not in schemes:
                *first, last = schemes
                these = f"schemes {', '.join(first)} and {last}" if first else f"scheme {last}"
                # As a recipe spells it, unless that takes more than a line.
                spelled = name if name == "distill" else f"{name}: {json.dumps(value)}"
                raise ValueError(f"{spelled} is for the {these}, not for {self.scheme}")
        if (
            self.scheme == "int8-static"
            and self.calibrate != "percentile"
            and self.percentile != 99.99
        ):
            raise ValueError(f"percentile is for calibrate: percentile, not for {self.calibrate}")
        if self.method == "hqq" and self.symmetric:
            raise ValueError("method: hqq looks for zero points; set symmetric: false")
        if (self.scheme == "mixed") != (self.budget is not None):
            raise ValueError("scheme: mixed and budget go together; give both or neither")
        if self.scheme == "fp32" and self.kv_cache is None:
            raise ValueError("scheme: 'fp32' changes no weights; set kv_cache, or take a scheme")
        self._check_calibration()
        return self

    def _check_calibration(self) -> None:
        readers = {
            "scheme: int8-static": self.scheme == "int8-static",
            "scheme: mixed": self.scheme == "mixed",
            "method: awq": self.method == "awq",
            "method: gptq": self.method == "gptq",
            "distill": self.distill is not None,
            "kv_cache": self.kv_cache is not None,
            "smooth": self.smooth is not None,
        }
        needed = next((name for name, reads in readers.items() if reads), None)
        if needed and self.calibration is None:
            raise ValueError(
                f"{needed} needs calibration: name texts, or for a graph "
                "that is no decoder `arrays`, to measure on"
            )
        if self.calibration and not needed:
            raise ValueError(
                f"calibration is only read for {' or '.join(readers)}; set one or leave it out"
            )

    def run(self, ctx: Context) -> Metrics:
        """Write `model.onnx`, `model.onnx.data`, `decoder.json`; link the tokeniser files."""
        if self.scheme == "auto":
            from lifecycle.stages.search import search

            return search(self, ctx)
        from lifecycle.engines.decoder import WEIGHTS
        from lifecycle.graph.check import check_graph
        from lifecycle.stages.quantizing import Quantizing

        model = ctx.input(self.model)
        self._require_possible(model)
        started = time.perf_counter()
        quantizing = Quantizing(self, ctx, model.path)
        made = quantizing.run()
        check_graph(ctx.out)
        for name in COMPANIONS:
            if (model.path / name).is_file():
                ctx.link(model.path / name)
        return {
            "bytes": made.bytes,
            "bits_per_weight": made.bits_per_weight,
            "ratio": round(made.bytes / (model.path / WEIGHTS).stat().st_size, 4),
            "seconds": round(time.perf_counter() - started, 3),
            **quantizing.metrics,
        }

    def _require_possible(self, model: OnnxGraph) -> None:
        from lifecycle.engines.adapters import AdapterLayout
        from lifecycle.engines.decoder import DecoderInfo

        if not isinstance(model, OnnxModel):
            self._require_plain()
            return
        info = DecoderInfo.load(model.path)
        parts = set(_PARTS.get(self.scheme, (self.scheme,)))
        if not parts <= {*info.schemes, "fp32"}:
            raise StageError(
                f"scheme '{self.scheme}' does not run on target '{info.target}' "
                f"of '{self.model}' (it runs {', '.join(info.schemes) or 'none'})"
            )
        if self.kv_cache is not None and self.kv_cache not in info.kv_dtypes:
            raise StageError(
                f"kv_cache '{self.kv_cache}' does not run on target '{info.target}' "
                f"of '{self.model}' (it runs {', '.join(info.kv_dtypes)})"
            )
        scaling = "method: awq" if self.method == "awq" else "smooth" if self.smooth else None
        has_slots = AdapterLayout.load(model.path) is not None
        if self.distill and has_slots:
            raise StageError(
                f"distill trains what the adapters of '{self.model}' read in their slots; leave it out, "
                "or export without adapters"
            )
        if scaling and has_slots:
            raise StageError(
                f"{scaling} scales what products read, and with it what the adapters of "
                f"'{self.model}' read in their slots; leave it out, or export without adapters"
            )

    def _require_plain(self) -> None:
        """What is for decoders only must not be asked of other graphs."""
        walks = {"scheme: mixed": self.scheme == "mixed"}
        walks |= {f"method: {self.method}": self.method in ("awq", "gptq")}
        walks |= {"distill": self.distill is not None}
        walks |= {"kv_cache": self.kv_cache is not None, "smooth": self.smooth is not None}
        if asked := next((name for name, is_set in walks.items() if is_set), None):
            raise StageError(
                f"{asked} walks the layers of a decoder, but '{self.model}' is a graph of "
                "another kind: take a scheme that reads weights alone, or int8-static"
            )
