"""The stage `export`: a Hugging Face model becomes an ONNX graph for a target."""

from __future__ import annotations

import time
from math import prod
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, Field

from lifecycle.errors import StageError
from lifecycle.graph.targets import Cpu, Target
from lifecycle.kinds import HfModel, OnnxModel
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.registry import SETTINGS
from lifecycle.pipeline.stage import Context, Ref, Stage

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "adapters.json",
)
"""Files that go with a model unchanged, where it has them."""


class AdapterSlots(BaseModel):
    """Room for LoRA adapters that are loaded when the model is served; one batch can mix them."""

    model_config = SETTINGS

    slots: int = Field(8, ge=1, le=1024)
    """Adapters that can be loaded together. A slot takes memory once it is filled."""
    rank: int = Field(16, ge=1, le=1024)
    """The largest rank of an adapter. Smaller ones are filled up with zeros, and computed as
    slowly as this rank."""


class Export(Stage):
    """Write the graph of a decoder in float32, its weights streamed tensor by tensor, and compare
    it with PyTorch."""

    produces = OnnxModel
    version: ClassVar[int] = 4

    model: Ref[HfModel]
    """A decoder without an adapter beside it; `docs/reference/architectures.md` lists those that
    are known."""
    target: Target = Cpu()
    """The hardware that the graph is made for."""
    adapters: AdapterSlots | None = None
    """Slots for LoRA adapters, such as `{slots: 8, rank: 16}`: how many can be loaded together, and the
    largest rank of one; null exports none. Steps without an adapter run the same graph as without
    slots."""
    hidden_states: bool = False
    """Write `hidden.onnx` too, the graph without its output head, which embeddings are made with; the
    weights are shared."""
    parity: float = Field(1e-4, gt=0)
    """Most that a logit may differ from PyTorch's, as a part of the largest one, however a text
    is fed: at once, in chunks, among others, or with a part of it taken back."""
    no_parity: str | None = Field(None, min_length=1)
    """Why this export is not compared with PyTorch, which takes the whole model in memory, such
    as `larger than the memory`; null compares."""

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
        if self.no_parity is None:
            _require_memory(model.path)
        started = time.perf_counter()
        ctx.progress.phase("weights, bytes")
        slots = (self.adapters.slots, self.adapters.rank) if self.adapters else None
        info = export_decoder(
            *(model.path, ctx.out, self.target, ctx.progress.update, slots),
            hidden_states=self.hidden_states,
        )
        check_graph(ctx.out)
        for name in COMPANIONS:
            if (model.path / name).is_file():
                ctx.link(model.path / name)
        metrics: Metrics = {
            "architecture": info.architecture,
            "bytes": (ctx.out / WEIGHTS).stat().st_size,
            "seconds": round(time.perf_counter() - started, 3),
        }
        return metrics | self._compare(ctx, model)

    def _compare(self, ctx: Context, model: HfModel) -> Metrics:
        """The parity gate; the largest difference of all ways of feeding."""
        if self.no_parity is not None:
            ctx.progress.log(f"not compared with PyTorch: {self.no_parity}")
            return {"no_parity": self.no_parity}
        from lifecycle.evaluation.parity import (
            measure_adapters,
            measure_hidden,
            measure_parity,
            missing_providers,
        )

        ctx.progress.phase("comparing with PyTorch")
        if missing := missing_providers(ctx.out):
            ctx.progress.log(f"compared on the CPU, not verified on a device: no {missing[0]} here")
        found = measure_parity(model.path, ctx.out, ctx.progress.update)
        if self.adapters is not None:
            ctx.progress.phase("comparing adapters with PEFT")
            found["adapters"] = measure_adapters(model.path, ctx.out)
        if self.hidden_states:
            ctx.progress.phase("comparing hidden states with PyTorch")
            found["hidden states"] = measure_hidden(model.path, ctx.out)
        worst = max(found.values())
        if worst > self.parity:
            ways = ", ".join(f"{name} {value:.2g}" for name, value in found.items())
            raise StageError(
                f"the graph's logits are not PyTorch's: they differ by {worst:.2g} of the largest, "
                f"parity allows {self.parity:g} (by the way of feeding: {ways})"
            )
        return {"parity": float(f"{worst:.2g}")}


def _require_memory(folder: Path) -> None:
    """PyTorch will need all weights as float32; say so before the export, not after it."""
    from lifecycle.engines.limits import available_memory
    from lifecycle.graph.checkpoint import Checkpoint

    elements = sum(prod(tensor.shape) for tensor in Checkpoint(folder).tensors.values())
    needed, free = 4 * elements, available_memory()
    if free is not None and needed > free:
        raise StageError(
            f"comparing with PyTorch takes {needed / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} are free; set no_parity to the reason to leave it out"
        )
