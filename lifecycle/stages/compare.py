"""The stage `compare`: a changed graph beside the one that it was made from, held to bounds."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lifecycle.evaluation.gates import (
    DIFFERENCES,
    check_bounds,
    judge,
    require_passed,
    spelled_gates,
)
from lifecycle.kinds import Arrays, Conversations, OnnxGraph, OnnxModel, Report, Split, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage


class Compare(Stage):
    """Run a graph and its reference over the same samples, and hold the differences to bounds.

    `max_relative_error` is the largest difference of an output, as a part of the largest value of
    that output for that sample. `cosine` is the lowest of all samples. `top1_agreement` is the
    share of rows of the first output, along its last axis, with the same largest entry.
    `size` and `speed` are those of `evaluate`: the bytes of graph and weights as a part of the
    reference's, and how many times as fast the graph is, the median of several turns in which both
    run one behind the other in one process. What is compared of a decoder are its logits.
    """

    produces = Report
    version: ClassVar[int] = 1

    model: Ref[OnnxGraph]
    """The graph to measure."""
    reference: Ref[OnnxGraph]
    """The graph it is compared with, such as the one before quantisation."""
    data: Ref[Conversations | Text | Arrays]
    """Samples for the graphs: `arrays`, or texts for decoders."""
    split: Split = "test"
    """Which part of the data."""
    samples: int | None = Field(None, ge=1)
    """How many samples; null takes all of the split."""
    sample_length: int = Field(512, ge=2)
    """Of texts: most tokens."""
    turns: int = Field(0, ge=0)
    """Turns in which the speed is measured; 0 measures none. A report with a speed is not the same
    bytes twice."""
    gates: Annotated[dict[str, str], BeforeValidator(spelled_gates)] = Field(default={})
    """Bounds by metric, such as `{cosine: ">= 0.99", size: "<= 30 %"}`. Outside of one, the
    run stops."""

    @field_validator("gates")
    @classmethod
    def _gates_are_possible(cls, gates: dict[str, str]) -> dict[str, str]:
        check_bounds(gates, DIFFERENCES)
        return gates

    @model_validator(mode="after")
    def _speed_is_measured(self) -> Self:
        if "speed" in self.gates and not self.turns:
            raise ValueError("gates: 'speed' is not measured: set turns, for example to 10")
        return self

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.errors import StageError
        from lifecycle.evaluation.difference import Pair
        from lifecycle.evaluation.findings import Findings
        from lifecycle.evaluation.inputs import read_inputs
        from lifecycle.evaluation.measure import weigh
        from lifecycle.evaluation.report import write_report

        data = ctx.input(self.data)
        model, reference = ctx.input(self.model), ctx.input(self.reference)
        samples = read_inputs(
            reference,
            data,
            self.data,
            split=self.split,
            count=self.samples,
            length=self.sample_length,
        )
        if not samples:
            raise StageError(f"the {self.split} split of '{self.data}' is empty: hold some out")
        outputs = ["logits"] if isinstance(model, OnnxModel) else None
        pair = Pair(model.path, reference.path, outputs)
        ctx.progress.phase("samples")
        found = Findings(pair.difference(samples, ctx.progress).metrics)
        found |= weigh([model, reference])
        if self.turns:
            ctx.progress.phase("turns of timing")
            found.metrics.update(pair.speeds(samples, self.turns, ctx.progress))
        found.counts["samples"] = len(samples)
        if missing := [name for name in self.gates if name not in found.metrics]:
            raise StageError(
                f"gates: '{missing[0]}' cannot be measured: the first output has no axis of scores"
            )
        verdicts = judge(found.metrics, self.gates)
        require_passed(verdicts, found.metrics)
        found.require_finite()
        write_report(
            ctx.out, found, verdicts, models=[model, reference], data=data, split=self.split
        )
        return {**found.metrics, **found.counts}
