"""The stage that measures a model, alone or beside a reference, and stops at a failed gate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from lifecycle.errors import StageError
from lifecycle.evaluation.gates import (
    BY_DEFAULT,
    METRICS,
    Measure,
    check_gates,
    judge,
    require_passed,
    spelled_gates,
)
from lifecycle.kinds import Conversations, HfModel, OnnxModel, Report, Split, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage

if TYPE_CHECKING:
    from lifecycle.evaluation.findings import Findings
    from lifecycle.evaluation.subject import Subject


class Evaluate(Stage):
    """Measure a model on a held-out split, and hold the results to bounds.

    `perplexity` is the exponential of the mean negative log-likelihood per scored token: of a
    conversation the assistant's tokens with the end of turn, of a text all tokens but the first
    of each window. `accuracy` is the share of conversations whose last assistant message,
    as the template renders it, the model writes exactly, but for white space around it, when it
    answers greedily. `agreement`
    compares the next-token distributions at the scored tokens with those of the reference:
    `top1_agreement`, `kl` (mean divergence from the reference, nats) and `logit_max_diff`.
    With a reference there are also `perplexity_ratio` (model / reference) and `accuracy_drop`
    (reference - model).

    Some are measured where a gate or `metrics` asks for them. `invariance` goes on with texts alone and beside
    others: `batch_invariance` is the share of texts that get the same tokens, and `batch_max_diff` the largest
    difference of the log-probabilities of tokens, up to the first that is another one. `feeding` computes a few texts in
    chunks, ragged among others, after a rollback, and with random adapters beside others where the model has slots for
    them: `feeding_max_diff` is the largest difference of logits from those of each at once, or alone with its adapter, as a
    part of the largest logit. `speed` and `size` are `tokens_per_second`
    of `batch` requests that decode together and `bytes` of the weights, and beside a reference
    `speed` (model / reference, the two taking turns) and `size` (model / reference). A report
    with a speed is not the same bytes twice.
    """

    produces = Report
    version = 2

    model: Ref[HfModel | OnnxModel]
    """The model to measure."""
    data: Ref[Conversations | Text]
    """Conversations, or plain text (which has no accuracy)."""
    reference: Ref[HfModel | OnnxModel] | None = None
    """The model it is compared with, such as the one before quantisation."""
    split: Split = "test"
    """Which part of the data."""
    metrics: list[Measure] | None = Field(default=None, min_length=1)
    """`perplexity`, `accuracy`, `agreement`, `invariance`, `feeding`, `speed`, `size`; by default the first three, as far
    as model, data and reference allow, and what the gates need."""
    gates: Annotated[dict[str, str], BeforeValidator(spelled_gates)] = Field(default={})
    """Bounds by metric, such as `{perplexity_ratio: "<= 1.02", accuracy: ">= 55 %", speed:
    ">= 1.2", size: "<= 0.3"}`. Outside of one, the run stops."""
    max_samples: int | None = Field(default=200, ge=1)
    """Most conversations, or windows of text, that are scored for perplexity and agreement."""
    max_generated: int | None = Field(default=500, ge=1)
    """Most conversations that are answered for accuracy."""
    max_length: int = Field(default=1024, ge=2)
    """Tokens: longer conversations are left out and counted, longer texts cut into windows."""
    batch: int = Field(default=1, ge=1, le=64)
    """For `speed`: how many requests decode together."""

    @field_validator("metrics")
    @classmethod
    def _metrics_are_possible(
        cls, metrics: list[Measure] | None, info: ValidationInfo
    ) -> list[Measure] | None:
        if metrics and "agreement" in metrics and info.data.get("reference") is None:
            raise ValueError("'agreement' compares two models: set 'reference'")
        return metrics

    @field_validator("gates")
    @classmethod
    def _gates_are_possible(cls, gates: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        measures = info.data.get("metrics") or get_args(Measure)
        check_gates(gates, measures, has_reference=info.data.get("reference") is not None)
        return gates

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.evaluation.report import write_report
        from lifecycle.evaluation.subject import SLOTS, opened

        data = ctx.input(self.data)
        wanted = self._wanted(data)
        models = [ctx.input(ref) for ref in (self.model, self.reference) if ref is not None]
        with ExitStack() as stack:
            slots = max(SLOTS, self.batch)
            subjects = [stack.enter_context(opened(model, slots)) for model in models]
            found = self._measure(ctx, subjects, data, wanted).settled(wanted)
        verdicts = judge(found.metrics, self.gates)
        require_passed(verdicts, found.metrics)
        found.require_finite()
        write_report(ctx.out, found, verdicts, models=models, data=data, split=self.split)
        return {**found.metrics, **found.counts}

    def _wanted(self, data: Conversations | Text) -> set[Measure]:
        """What to measure, as far as the inputs allow it."""
        wanted: set[Measure] = {METRICS[name].measure for name in self.gates}
        wanted.update(self.metrics or BY_DEFAULT)
        if self.reference is None:
            wanted.discard("agreement")
        if isinstance(data, Conversations):
            return wanted
        asked = [*(self.metrics or ()), *self.gates]
        refused = [name for name in asked if name in ("accuracy", "accuracy_drop")]
        if refused:
            raise StageError(
                f"'{refused[0]}' needs conversations, but '{self.data}' is plain text, which "
                "asks no question: take it out, or evaluate on conversations"
            )
        wanted.discard("accuracy")
        return wanted

    def _measure(
        self,
        ctx: Context,
        subjects: Sequence[Subject],
        data: Conversations | Text,
        wanted: set[Measure],
    ) -> Findings:
        from lifecycle.evaluation.findings import Findings
        from lifecycle.evaluation.measure import time_decoding, weigh

        found = Findings()
        if wanted - {"speed", "size"}:
            found |= self._measure_quality(ctx, subjects, data, wanted)
        if "speed" in wanted:
            ctx.progress.phase("timing")
            found |= time_decoding(subjects, self.batch, ctx.progress)
        if "size" in wanted:
            found |= weigh([subject.artifact for subject in subjects])
        return found

    def _measure_quality(
        self,
        ctx: Context,
        subjects: Sequence[Subject],
        data: Conversations | Text,
        wanted: set[Measure],
    ) -> Findings:
        from lifecycle.evaluation.feeding import compare_feeding
        from lifecycle.evaluation.findings import Findings
        from lifecycle.evaluation.invariance import compare_batches
        from lifecycle.evaluation.measure import ask, score
        from lifecycle.evaluation.samples import question, ranked_rows, select, supervised, windows

        rows = ranked_rows(data, self.split, self.data)
        tokenizers = [subject.tokenizer for subject in subjects]
        context = min(self.max_length, *(subject.engine.max_model_len for subject in subjects))
        found = Findings()
        if wanted & {"perplexity", "agreement", "invariance", "feeding"}:
            build = partial(windows, length=context) if isinstance(data, Text) else supervised
            samples = select(rows, tokenizers, build, context, self.max_samples)
            if wanted & {"perplexity", "agreement"}:
                ctx.progress.phase("scoring")
                found |= score(subjects, samples, ctx.progress)
            if "invariance" in wanted:
                ctx.progress.phase("alone and together")
                found |= compare_batches(subjects[0], [s for s, *_ in samples.items], ctx.progress)
            if "feeding" in wanted:
                ctx.progress.phase("in chunks, ragged and rolled back")
                found |= compare_feeding(subjects[0], [s for s, *_ in samples.items], ctx.progress)
        if "accuracy" in wanted:
            ctx.progress.phase("answering")
            questions = select(rows, tokenizers, question, context, self.max_generated)
            found |= ask(subjects, questions, ctx.progress)
        return found
