"""Measuring models: scored sample by sample, asked in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lifecycle.engines.requests import FinishReason, SamplingParams
from lifecycle.errors import EngineError, StageError
from lifecycle.evaluation.findings import Answer, Findings
from lifecycle.evaluation.samples import OTHER_TOKENS, Question, Sample, Selection
from lifecycle.evaluation.scoring import Scorer
from lifecycle.evaluation.speed import decode_speeds
from lifecycle.evaluation.subject import Subject, weight_bytes
from lifecycle.kinds import HfModel, OnnxGraph
from lifecycle.pipeline.stage import Progress


def score(
    subjects: Sequence[Subject], selection: Selection[Sample], progress: Progress
) -> Findings:
    """Perplexity of the first subject and, if there is a second, its agreement with that one.

    Each model runs once over each sample, and no more than one sample's logits are held.

    Raises:
        StageError: the two do not have the same tokens.
    """
    _require_same_tokens(subjects, selection)
    scorer = Scorer(len(subjects))
    for done, (sample, *_) in enumerate(selection.items, start=1):
        targets = np.array(sample.targets)
        logits = [s.engine.logits(sample.token_ids)[targets - 1] for s in subjects]
        scorer.add(np.array(sample.token_ids)[targets], logits)
        progress.update(done, len(selection.items))
    if selection.too_long:
        progress.log(f"{selection.too_long} samples do not fit into the context: left out")
    return _scored(scorer, selection)


def ask(
    subjects: Sequence[Subject], selection: Selection[Question], progress: Progress
) -> Findings:
    """Accuracy of the first subject and, if there is a second, the drop from that one's.

    Raises:
        EngineError: an engine failed in an answer.
    """
    # Each model has its own questions: another template puts other text around an answer.
    asked = list(zip(*selection.items, strict=True))
    answers = [
        _answers(subject, questions, _part(progress, index, len(subjects)))
        for index, (subject, questions) in enumerate(zip(subjects, asked, strict=True))
    ]
    questions = asked[0]
    total = len(questions)
    correct, *reference = map(_count_correct, asked, answers)
    if selection.too_long:
        progress.log(f"{selection.too_long} questions do not fit into the context: left out")
    found = Findings(
        metrics={"accuracy": correct / total},
        counts={"questions": total, "questions_too_long": selection.too_long},
        answers=[
            Answer(question.text, question.expected, got)
            for question, got in zip(questions, answers[0], strict=True)
        ],
    )
    if reference:
        found.reference_metrics["accuracy"] = reference[0] / total
        # From the counts: the difference of two rounded shares can miss a bound that it meets.
        found.metrics["accuracy_drop"] = (reference[0] - correct) / total
    return found


def time_decoding(subjects: Sequence[Subject], batch: int, progress: Progress) -> Findings:
    """Speed of the first subject and, if there is a second, beside that one's.

    Raises:
        StageError, EngineError: as `decode_speeds`.
    """
    # The last one is what the others are compared with.
    speeds = decode_speeds([s.engine for s in reversed(subjects)], batch, progress)[::-1]
    found = Findings(metrics={"tokens_per_second": _three(speeds[0].tokens_per_second)})
    if len(speeds) > 1:
        found.reference_metrics["tokens_per_second"] = _three(speeds[1].tokens_per_second)
        found.metrics["speed"] = _three(speeds[0].ratio)
    return found


def weigh(models: Sequence[HfModel | OnnxGraph]) -> Findings:
    """Size of the first model and, if there is a second, as a part of that one's."""
    size, *reference = map(weight_bytes, models)
    found = Findings(metrics={"bytes": size})
    if reference:
        found.reference_metrics["bytes"] = reference[0]
        found.metrics["size"] = float(f"{size / reference[0]:.6g}")
    return found


def _three(value: float) -> float:
    """With three digits, which is what a clock is good for."""
    return float(f"{value:.3g}")


def _require_same_tokens(subjects: Sequence[Subject], selection: Selection[Sample]) -> None:
    if any(one != item[0] for item in selection.items for one in item[1:]):
        raise StageError(OTHER_TOKENS)
    sizes = [subject.engine.vocab_size for subject in subjects]
    if len(set(sizes)) > 1:
        raise StageError(
            f"the model gives {sizes[0]} logits per token and its reference {sizes[1]}: they do "
            "not compare; use 'metrics: [accuracy]', or a reference with the same vocabulary"
        )


def _scored(scorer: Scorer, selection: Selection[Sample]) -> Findings:
    loss, *reference = scorer.losses
    found = Findings(
        metrics={"perplexity": loss.perplexity},
        counts={
            "samples": len(selection.items),
            "samples_too_long": selection.too_long,
            "tokens": loss.tokens,
        },
    )
    if reference:
        agreement = scorer.agreement
        found.reference_metrics["perplexity"] = reference[0].perplexity
        found.metrics.update(
            perplexity_ratio=loss.perplexity / reference[0].perplexity,
            top1_agreement=agreement.top1,
            kl=agreement.kl,
            logit_max_diff=agreement.logit_max_diff,
        )
    return found


def _part(progress: Progress, index: int, of: int) -> Callable[[int, int], None]:
    """What tells of one of several equal parts, so that the second does not begin at 0 again."""
    return lambda done, total: progress.update(index * total + done, of * total)


def _answers(
    subject: Subject, questions: Sequence[Question], on_done: Callable[[int, int], None]
) -> list[str]:
    stops = subject.tokenizer.eos_token_ids
    params = [SamplingParams(max_tokens=q.max_new_tokens, stop_token_ids=stops) for q in questions]
    generations = subject.engine.generate([q.prompt for q in questions], params, on_done)
    if any(generation.finish_reason is FinishReason.ERROR for generation in generations):
        raise EngineError(f"{subject.artifact.path} failed while it answered")
    return [subject.tokenizer.decode(generation.token_ids) for generation in generations]


def _count_correct(questions: Sequence[Question], answers: Sequence[str]) -> int:
    pairs = zip(questions, answers, strict=True)
    return sum(question.expected.strip() == got.strip() for question, got in pairs)
