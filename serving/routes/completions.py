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
    params = sampling(service, body, body.logprobs)
    prompts: list[Prompt] = []
    for prompt in tokens:
        default = max(DEFAULT_MAX_TOKENS, params.min_tokens)
        room = service.room(prompt, body.max_tokens, default, "prompt")
        prompts += choices(prompt, limited(params, room), body.n)
    request_id: str = request.state.request_id
    generation = await begin(request, body, card, prompts, continued=True)
    form = CompletionFormat(
        id=request_id.replace("req_", "cmpl-"),
        card=card,
        token_text=service.token_text,
        prompt_tokens=sum(map(len, tokens)),
        num_choices=len(prompts),
        include_usage=body.include_usage,
        logprobs=body.logprobs is not None,
        echoes=_echoes(service, body) if body.echo else {},
    )
    return await respond(request, generation, form, body.stream)


def _echoes(service: Service, body: CompletionBody) -> dict[int, str]:
    texts = [p if isinstance(p, str) else service.tokenizer.decode(p) for p in body.prompt]
    return dict(enumerate(text for text in texts for _ in range(body.n)))
