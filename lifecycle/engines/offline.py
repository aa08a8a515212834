"""Many prompts at once through an idle engine, by what every engine offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lifecycle.engines.base import Engine
from lifecycle.engines.requests import (
    Event,
    FinishReason,
    Generation,
    Request,
    SamplingParams,
    Score,
)
from lifecycle.errors import EngineError, RequestError

OnDone = Callable[[int, int], None]


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    on_done: OnDone | None = None,
    adapter: str | None = None,
) -> list[Generation]:
    """As `Engine.generate`."""
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(
            f"there are {len(params)} params for {len(prompts)} prompts: give one for each, or one for all"
        )
    pairs = zip(prompts, params, strict=True)
    requests = [Request(str(index), *pair, adapter) for index, pair in enumerate(pairs)]
    tokens: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[float]] = [[] for _ in requests]
    ends: dict[int, FinishReason] = {}

    def take(index: int, event: Event) -> None:
        if event.token_id is not None:
            tokens[index].append(event.token_id)
            if event.logprob is not None:
                logprobs[index].append(event.logprob)
        if event.finish_reason is not None:
            ends[index] = event.finish_reason

    _run(engine, requests, take, "prompt", on_done)
    return [Generation(tuple(tokens[i]), ends[i], tuple(logprobs[i])) for i in range(len(requests))]


def score(
    engine: Engine,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    on_done: OnDone | None = None,
) -> list[Score]:
    """As `Engine.score`."""
    requests: list[Request] = []
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            empty = "continuation" if len(context) else "context"
            raise RequestError(f"pair {index} has an empty {empty}; it needs at least one token")
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(context))
        requests.append(Request(str(index), [*context, *continuation], params))
    found: dict[int, Score] = {}

    def take(index: int, event: Event) -> None:
        parts = event.prompt_logprobs
        is_greedy = all(part.rank == 1 for part in parts)
        found[index] = Score(sum(part.logprob for part in parts), is_greedy)

    _run(engine, requests, take, "pair", on_done)
    return [found[index] for index in range(len(requests))]


def _run(
    engine: Engine,
    requests: Sequence[Request],
    take: Callable[[int, Event], None],
    kind: str,
    on_done: OnDone | None,
) -> None:
    """Step until all requests, whose ids are their places, have ended; whatever happens, none is left
    behind.

    Args:
        take: is told the place of a request and what has come of it.
        kind: what a request is called where it fails.

    Raises:
        RequestError: one can never be served; nothing has been run.
        EngineError: one has failed.
    """
    num_done = 0
    try:
        for request in requests:
            engine.submit(request)
        while num_done < len(requests):
            for event in engine.step():
                if event.finish_reason is FinishReason.ERROR:
                    raise EngineError(f"{kind} {event.request_id}: {event.error}")
                take(int(event.request_id), event)
                if event.finish_reason is not None:
                    num_done += 1
                    if on_done is not None:
                        on_done(num_done, len(requests))
    finally:
        for request in requests:
            engine.cancel(request.id)
        # It tells the ends of those that were still there, to nobody.
        engine.step()
