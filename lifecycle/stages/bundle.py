"""The stage that closes a model, its tokeniser, defaults and history into what is served."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, field_validator

from lifecycle.errors import GateError, StageError
from lifecycle.kinds import Bundle, OnnxGraph, OnnxModel, Report
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.registry import SETTINGS
from lifecycle.pipeline.stage import Context, Ref, Stage

if TYPE_CHECKING:
    from lifecycle.engines.decoder import DecoderInfo

GENERATION_CONFIG = "generation_config.json"
MODEL_CARD = "README.md"

_LINEAGE_FIELDS = ("digest", "kind", "use", "version", "settings", "source", "inputs")
"""What the manifest says of an ancestor: what determines its bytes, so no metrics, which may
be timings."""


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"


class GenerationDefaults(BaseModel):
    """How a server samples where a request does not say; named as in `generation_config.json`."""

    model_config = SETTINGS

    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the most likely tokens up to this probability mass."""
    top_k: int | None = Field(default=None, ge=0)
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Keep tokens at least this likely beside the most likely one."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Above 1, tokens that have occurred become less likely."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of an answer."""


class BundleStage(Stage):
    """Close a model into a bundle: of a decoder, what `lifecycle serve` takes.

    Files beside the model's: `generation_config.json` of a decoder, `README.md` (the model card),
    and `manifest.json` with every file's hash, the report and the lineage back to the sources. A
    bundle without a passed gate says that it is ungated.
    """

    produces = Bundle
    version = 1

    model: Ref[OnnxGraph]
    """An ONNX model: a decoder, or any other graph."""
    report: Ref[Report] | None = None
    """An evaluation of this very model, whose gates have passed."""
    name: str | None = Field(default=None, pattern=_NAME)
    """What the model is called; by default its architecture and weight scheme, or what the recipe
    calls a graph of another kind."""
    generation: GenerationDefaults = GenerationDefaults()
    """Sampling defaults of a decoder, over those that the model comes with: `temperature`, `top_p`,
    `top_k`, `min_p`, `repetition_penalty`, `max_new_tokens`."""

    @field_validator("name", mode="before")
    @classmethod
    def _is_a_name(cls, name: Any) -> Any:
        if isinstance(name, str) and re.fullmatch(_NAME, name) is None:
            raise ValueError(
                f"{name!r} is no name for a model: use letters, digits, and behind the first . _ / -"
            )
        return name

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.bundle.card import model_card
        from lifecycle.bundle.manifest import write_manifest

        model = ctx.input(self.model)
        info = self._decoder(model)
        report = self._checked_report(ctx, model)
        name = str(self.model) if info is None else f"{info.architecture}-{info.scheme}"
        content = {
            "name": self.name or name,
            "gated": report is not None and bool(report["gates"]),
            "model": _described_graph(model) if info is None else _described(model, info),
            "report": report,
            "lineage": _lineage(ctx),
        }
        for entry in model.files:
            if entry.path not in (GENERATION_CONFIG, MODEL_CARD):
                ctx.link(model.path / entry.path, entry.path)
        if info is not None:
            self._write_generation_config(ctx, model, info)
        (ctx.out / MODEL_CARD).write_text(model_card(content), encoding="utf-8")
        manifest = write_manifest(ctx.out, content)
        size = sum(entry["size"] for entry in manifest["files"])
        return {"bytes": size, "gated": manifest["gated"]}

    def _decoder(self, model: OnnxGraph) -> DecoderInfo | None:
        from lifecycle.engines.decoder import DecoderInfo

        if isinstance(model, OnnxModel):
            return DecoderInfo.load(model.path)
        if self.generation != GenerationDefaults():
            raise StageError(
                f"'generation' is for decoders, but '{self.model}' is a graph of another kind: "
                "take it out"
            )
        return None

    def _checked_report(self, ctx: Context, model: OnnxGraph) -> dict[str, Any] | None:
        """The report without its examples, which are of no use to a server."""
        if self.report is None:
            return None
        report = ctx.input(self.report).content
        measured = report["model"]["digest"]
        if measured != model.digest:
            raise StageError(
                f"report '{self.report}' measured the model {measured}, but '{self.model}' is "
                f"{model.digest}: evaluate '{self.model}', or bundle the model that was measured"
            )
        failed = [gate["metric"] for gate in report["gates"] if not gate["passed"]]
        if failed:
            raise GateError(f"report '{self.report}' has failed gates: {', '.join(failed)}")
        return {key: value for key, value in report.items() if key not in ("format", "samples")}

    def _write_generation_config(self, ctx: Context, model: OnnxGraph, info: DecoderInfo) -> None:
        """Keep what the model says, fill in the tokens that end an answer, then these settings."""
        source = model.path / GENERATION_CONFIG
        config = {"bos_token_id": info.bos_token_id, "eos_token_id": list(info.eos_token_ids)}
        if source.is_file():
            config |= json.loads(source.read_text(encoding="utf-8"))
        config |= self.generation.model_dump(exclude_none=True)
        if self.generation.temperature is not None:
            # A kept `do_sample: false` would make the temperature mean nothing.
            config["do_sample"] = self.generation.temperature > 0
        text = json.dumps(config, indent=2, sort_keys=True)
        (ctx.out / GENERATION_CONFIG).write_text(text + "\n", encoding="utf-8")


def _described(model: OnnxGraph, info: DecoderInfo) -> dict[str, Any]:
    return {
        "digest": model.digest,
        "kind": model.kind,
        "architecture": info.architecture,
        "scheme": info.scheme,
        "target": info.target,
        "vocab_size": info.vocab_size,
        "context_length": info.max_position_embeddings,
    }


def _described_graph(model: OnnxGraph) -> dict[str, Any]:
    """What a caller must know of a graph that has no `decoder.json`."""
    from lifecycle.graph.inspect import inspect_graph

    found = inspect_graph(model.path)
    precisions = Counter[str]()
    for matrix in found.matrices:
        precisions[matrix.precision] += matrix.parameters
    return {
        "digest": model.digest,
        "kind": model.kind,
        "opsets": found.opsets,
        "inputs": [asdict(port) for port in found.inputs],
        "outputs": [asdict(port) for port in found.outputs],
        "parameters": found.parameters,
        "precisions": dict(precisions.most_common()),
    }


def _lineage(ctx: Context) -> list[dict[str, Any]]:
    """The ancestors, each once, the oldest first."""
    from lifecycle.pipeline.runner import lineage

    return [
        {field: record[field] for field in _LINEAGE_FIELDS if field in record}
        for record in lineage(ctx.inputs.values())
    ]
