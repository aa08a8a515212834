"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from serving.formats import ChatFormat
from serving.routes.generate import (
    admit,
    begin,
    choices,
    limited,
    respond,
    sampling,
    scored,
    service_of,
)
from serving.schemas import ChatBody

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """The assistant's next message."""
    service = service_of(request)
    card = admit(service, body, num_prompts=1)
    messages = [message.as_template_input for message in body.messages]
    prompt = await service.chat_tokens(messages)
    params = sampling(service, body, body.top_logprobs if body.logprobs else None)
    asked = body.max_completion_tokens or body.max_tokens
    room = service.room(prompt, asked, service.defaults.max_tokens, "messages")
    params = scored(limited(params, room), [prompt], body.n, body.prompt_logprobs)
    request_id: str = request.state.request_id
    prompts = choices(prompt, params, body.n)
    generation, card = await begin(request, body, card, prompts)
    form = ChatFormat(
        id=request_id.replace("req_", "chatcmpl-"),
        card=card,
        token_text=service.token_text,
        prompt_tokens=len(prompt),
        num_choices=body.n,
        include_usage=body.include_usage,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
    return await respond(request, body, generation, form)
