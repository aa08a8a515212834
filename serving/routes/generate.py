"""What the two routes that generate have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request
from starlette.responses import Response

from lifecycle.engines.requests import SamplingParams
from serving.cards import ModelCard
from serving.errors import bad_request, model_not_found
from serving.formats import Format
from serving.generation import Generation, best_answers
from serving.http import unless_disconnected
from serving.schemas import GenerationBody
from serving.service import Service
from serving.settings import ServerSettings
from serving.sse import EventStream
from serving.structured import asked_grammar

Prompt = tuple[Sequence[int], SamplingParams]

MAX_SCORES = 2**16
"""Log-probabilities of prompts in one response: up to 5 MB of it, whose writing holds up the others for 0.1 s."""

_NUMBERS = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "min_tokens",
}
"""Fields that the engine takes as they are."""


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    return request.app.state.service


def admit(service: Service, body: GenerationBody, num_prompts: int) -> ModelCard:
    """Turn a request away before it costs anything; what it asks for else.

    Raises:
        ApiError: another model, or no room for its answers.
    """
    card = service.cards.get(body.model)
    if card is None:
        raise model_not_found(body.model, service.cards)
    service.worker.admit(num_prompts * body.num_answers)
    return card


def salt_of(request: Request, body: GenerationBody) -> str:
    """What keeps the cached prompts of one client from another's."""
    return f"{_tenant(request)}:{body.cache_salt}"


def _tenant(request: Request) -> str:
    """Whose key came with a request; all are one where no keys are asked for."""
    return getattr(request.state, "tenant", "")


def sampling(service: Service, body: GenerationBody, logprobs: int | None) -> SamplingParams:
    """How a request samples, its gaps filled with the model's defaults."""
    given = body.model_dump(include=_NUMBERS, exclude_none=True)
    defaults = service.defaults
    values = {
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "min_p": defaults.min_p,
        "typical_p": defaults.typical_p,
        "repetition_penalty": defaults.repetition_penalty,
    } | given
    values["top_k"] = max(values["top_k"], 0)
    return SamplingParams(
        **values,
        seed=body.seed,
        logit_bias=body.logit_bias,
        stop_token_ids=frozenset(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


def limited(params: SamplingParams, room: int) -> SamplingParams:
    """The parameters with room for so many tokens.

    Raises:
        ApiError: more are asked for.
    """
    if params.min_tokens > room:
        raise bad_request(
            f"min_tokens is {params.min_tokens}, but the answer may have {room} tokens at most",
            param="min_tokens",
        )
    return replace(params, max_tokens=room)


async def begin(
    request: Request,
    body: GenerationBody,
    card: ModelCard,
    prompts: Sequence[Prompt],
    *,
    continued: bool = False,
) -> tuple[Generation, ModelCard]:
    """Begin to answer prompts as the model that the request names, for the client that sent it; see
    `Service.generate`. With the card of what answers: an adapter may have been replaced since the request
    came."""
    settings: ServerSettings = request.app.state.settings
    if body.priority < 0 and not settings.allow_priority:
        raise bad_request(
            f"priority is {body.priority}; this server takes 0 or more, which go after others",
            param="priority",
        )
    service, asked = service_of(request), asked_grammar(body)
    grammar = None if asked is None else await service.grammars.compile(asked)
    generation = await service.generate(
        request.state.request_id,
        prompts,
        body.stop,
        continued=continued,
        adapter=card.name if card.parent else None,
        salt=salt_of(request, body),
        tenant=_tenant(request),
        priority=body.priority,
        timeout=body.timeout,
        grammar=grammar,
    )
    # The engine takes requests and adapters one after the other, and the event loop hears of them in that order.
    return generation, service.cards.get(card.name, card)


def scored(
    params: SamplingParams, prompts: Sequence[Sequence[int]], num_answers: int, count: int | None
) -> SamplingParams:
    """The parameters with the `count` likeliest tokens told of each token of the prompts; None tells
    nothing.

    Raises:
        ApiError: that is too much.
    """
    if count is None:
        return params
    total = sum(map(len, prompts)) * num_answers * (count + 1)
    if total > MAX_SCORES:
        raise bad_request(
            f"the request asks for {total} log-probabilities of prompts; {MAX_SCORES} are given at "
            "most: send fewer prompts, or ask for fewer tokens of each place"
        )
    return replace(params, prompt_logprobs=count)


def choices(prompt: Sequence[int], params: SamplingParams, n: int) -> list[Prompt]:
    """A prompt once for each of its `n` answers; with a seed, each answer has its own."""
    if params.seed is None:
        return [(prompt, params)] * n
    return [(prompt, replace(params, seed=params.seed + index)) for index in range(n)]


async def respond(
    request: Request, body: GenerationBody, generation: Generation, form: Format
) -> Response:
    """The answers as a stream, or all at once."""
    if body.stream:
        settings: ServerSettings = request.app.state.settings
        return EventStream(generation, form, settings.keep_alive)
    try:
        answers = await unless_disconnected(request.receive, generation.collect())
    finally:
        generation.close()
    if body.num_answers > body.n:
        answers = best_answers(answers, body.num_answers, body.n)
    if not any(answer.tokens or answer.prompt_logprobs for answer in answers):
        content = form.whole(answers, generation)
    else:
        # What is told of each token takes longer than the event loop may be held up.
        content = await asyncio.to_thread(form.whole, answers, generation)
    return Response(content, media_type="application/json")
