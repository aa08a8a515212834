"""The stage `prefill`: one graph computes prompts, another one what is generated."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lifecycle.errors import StageError
from lifecycle.kinds import Conversations, OnnxModel, Text
from lifecycle.pipeline.artifact import MANIFEST, Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage


class Prefill(Stage):
    """Give a decoder a second graph that computes its prompts.

    Prompts are limited by arithmetic, single steps by the bytes of the weights: on many processors
    row-wise int8 is the quicker form for the one and int4 for the other. Both graphs are quantised from
    the same export and fill the same cache; a token's graph depends on nothing but whether it belongs to the
    prompt. The model takes the memory of both. Requests with an adapter are computed by `model` alone.
    """

    produces = OnnxModel
    version: ClassVar[int] = 1

    model: Ref[OnnxModel]
    """What generates, such as a model in int4."""
    prompts: Ref[OnnxModel]
    """What computes prompts: the same model in another form, such as int8-rowwise."""
    data: Ref[Conversations | Text]
    """Texts like those that the model will see; some of the test split are read for the comparison."""
    samples: int = Field(32, ge=1)
    """Of `data`: how many texts."""
    sample_length: int = Field(256, ge=16)
    """Of `data`: most tokens of a text."""
    max_kl: float = Field(0.05, gt=0)
    """Most that the next tokens may diverge, in nats on average, from what `model` says by itself, where
    the first half of each text is a prompt."""

    def run(self, ctx: Context) -> Metrics:
        from dataclasses import replace

        from lifecycle.engines.decoder import FILE, PREFILL_WEIGHTS, WEIGHTS, DecoderInfo
        from lifecycle.evaluation.inputs import read_texts
        from lifecycle.evaluation.prompt_graph import compare_prompts
        from lifecycle.graph.prefill import check_alike, write_prefill

        model, prompts = ctx.input(self.model), ctx.input(self.prompts)
        info = check_alike(model.path, prompts.path)
        for file in model.files:
            if file.path not in (FILE, MANIFEST):
                ctx.link(model.path / file.path, file.path)
        write_prefill(prompts.path, ctx.out)
        ctx.link(prompts.path / WEIGHTS, PREFILL_WEIGHTS)
        other = DecoderInfo.load(prompts.path)
        bits = max(info.weight_bits or 0, other.weight_bits or 0) or None
        replace(info, prefill_scheme=other.scheme, weight_bits=bits).save(ctx.out)
        ctx.progress.phase("comparing, texts")
        texts = read_texts(
            *(ctx.out, ctx.input(self.data), self.data),
            split="test",
            count=self.samples,
            length=self.sample_length,
        )
        found = compare_prompts(ctx.out, texts, ctx.progress.update)
        if not found.kl <= self.max_kl:
            raise StageError(
                f"with prompts from '{self.prompts}' the next tokens of '{self.model}' diverge by "
                f"{found.kl:.3g} nats, max_kl allows {self.max_kl:g}: take a more precise form for "
                "prompts, or allow more"
            )
        return {
            "bytes": sum((ctx.out / name).stat().st_size for name in (WEIGHTS, PREFILL_WEIGHTS)),
            "kl": float(f"{found.kl:.3g}"),
            "top1": round(found.top1, 4),
        }
