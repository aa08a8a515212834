"""Whether what a model says depends on what else it computes."""

from __future__ import annotations

from lifecycle.engines.requests import FinishReason, Generation, SamplingParams
from lifecycle.errors import EngineError
from lifecycle.evaluation.findings import Findings
from lifecycle.evaluation.samples import Sample
from lifecycle.evaluation.subject import SLOTS, Subject
from lifecycle.pipeline.stage import Progress

TEXTS = 2 * SLOTS
"""Most texts that are gone on with."""
_PARAMS = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0)


def compare_batches(subject: Subject, samples: list[Sample], progress: Progress) -> Findings:
    """Go on with the first halves of texts, each alone and all together: `batch_invariance` is the share of those
    that get the same tokens, `batch_max_diff` how far, at most, the log-probabilities of chosen tokens are apart, up to
    the first that is another one.

    Raises:
        EngineError: the engine failed.
    """
    prompts = [sample.token_ids[: (sample.length + 1) // 2] for sample in samples[:TEXTS]]
    alone: list[Generation] = []
    for done, prompt in enumerate(prompts, start=1):
        alone += _continued(subject, [prompt])
        progress.update(done, len(prompts) + 1)
    pairs = list(zip(alone, _continued(subject, prompts), strict=True))
    progress.update(len(prompts) + 1, len(prompts) + 1)
    num_same = sum(one.token_ids == other.token_ids for one, other in pairs)
    return Findings(
        metrics={
            "batch_invariance": num_same / len(pairs),
            "batch_max_diff": max(_apart(one, other) for one, other in pairs),
        },
        counts={"continuations": len(pairs)},
    )


def _apart(one: Generation, other: Generation) -> float:
    """The largest difference up to the first token that is another one: behind it the texts are others."""
    found = 0.0
    for index, (a, b) in enumerate(zip(one.logprobs, other.logprobs, strict=False)):
        found = max(found, abs(a - b))
        if one.token_ids[index] != other.token_ids[index]:
            break
    return found


def _continued(subject: Subject, prompts: list[tuple[int, ...]]) -> list[Generation]:
    found = subject.engine.generate(prompts, _PARAMS)
    if any(generation.finish_reason is FinishReason.ERROR for generation in found):
        raise EngineError(f"{subject.artifact.path} failed while it went on with a text")
    return found
