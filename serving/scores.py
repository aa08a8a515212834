"""How log-probabilities of a prompt's tokens are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.generation import Answer
from serving.text import TokenTexts

Json = dict[str, Any]


def prompt_entries(answer: Answer, count: int, text: TokenTexts) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt the `count` likeliest ones of its place and
    itself, by id; nothing for the first one. They are empty where no token was reached in time."""
    entries: list[Json | None] = [None]
    for id, score in zip(answer.prompt[1:], answer.prompt_logprobs, strict=False):
        ranked = enumerate(score.top_logprobs[:count], start=1)
        entry = {
            str(other): _entry(logprob, rank, text(other)) for rank, (other, logprob) in ranked
        }
        entries.append(entry | {str(id): _entry(score.logprob, score.rank, text(id))})
    return entries


def echoed_logprobs(answer: Answer, count: int, text: TokenTexts) -> Json:
    """OpenAI's `logprobs` of a completion, of the prompt that `echo` repeats; the first token has none."""
    ids, scores = answer.prompt, answer.prompt_logprobs
    stream, offsets, shown = text.stream(), list[int](), 0
    for id in ids:
        offsets.append(shown)
        shown += len(stream.push(id))
    # Without scores, for its time was over before, there are none of the others either.
    blank: list[None] = [None] * (len(ids) - len(scores))
    return {
        "tokens": [text(id) for id in ids],
        "token_logprobs": [*blank, *(score.logprob for score in scores)],
        "top_logprobs": [*blank, *(by_text(score.top_logprobs[:count], text) for score in scores)],
        "text_offset": offsets,
    }


def by_text(top: Sequence[tuple[int, float]], text: TokenTexts) -> dict[str, float]:
    """The likeliest tokens by their texts; of several with one text the likeliest counts."""
    return {text(id): logprob for id, logprob in reversed(top)}


def _entry(logprob: float, rank: int, text: str) -> Json:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}
