"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from serving.formats import CompletionFormat
from serving.routes.generate import (
    Prompt,
    admit,
    begin,
    choices,
    limited,
    respond,
    sampling,
    scored,
    service_of,
)
from serving.schemas import CompletionBody
from serving.service import Service

router = APIRouter()

DEFAULT_MAX_TOKENS = 16
"""What the API gives a completion that does not say."""


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """The continuation of each prompt; answer `i` of prompt `p` has index `p * n + i`."""
    service = service_of(request)
    card = admit(service, body, num_prompts=len(body.prompt))
    tokens = [await service.prompt_tokens(prompt) for prompt in body.prompt]
    logprobs = body.logprobs
    if logprobs is None and body.num_answers > body.n:
        # By which the best ones are found.
        logprobs = 0
    params = sampling(service, body, logprobs)
    params = scored(params, tokens, body.num_answers, _scores(body))
    prompts: list[Prompt] = []
    for prompt in tokens:
        default = max(DEFAULT_MAX_TOKENS, params.min_tokens)
        room = service.room(prompt, body.max_tokens, default, "prompt")
        prompts += choices(prompt, limited(params, room), body.num_answers)
    request_id: str = request.state.request_id
    generation, card = await begin(request, body, card, prompts, continued=True)
    form = CompletionFormat(
        id=request_id.replace("req_", "cmpl-"),
        card=card,
        token_text=service.token_text,
        prompt_tokens=sum(map(len, tokens)),
        num_choices=len(tokens) * body.n,
        include_usage=body.include_usage,
        logprobs=body.logprobs is not None,
        prompt_logprobs=body.prompt_logprobs,
        num_echoed=body.logprobs if body.echo else None,
        echoes=_echoes(service, body) if body.echo else {},
    )
    return await respond(request, body, generation, form)


def _scores(body: CompletionBody) -> int | None:
    """How many tokens are told of each place of the prompts; None for nothing."""
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None]
    if body.max_tokens == 0:
        # The engine runs a prompt without an answer only for its scores.
        asked.append(0)
    return max((count for count in asked if count is not None), default=None)


def _echoes(service: Service, body: CompletionBody) -> dict[int, str]:
    texts = [p if isinstance(p, str) else service.tokenizer.decode(p) for p in body.prompt]
    return dict(enumerate(text for text in texts for _ in range(body.n)))
