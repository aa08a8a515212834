"""`/v1/chat/completions` on a tiny model with a chat template, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams
from serving.schemas import ChatBody
from tests.serving.running import client

QUESTION = [{"role": "user", "content": "Where does the fox jump?"}]


@pytest.fixture(scope="module")
def api(chat_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chat_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_answer_is_that_of_the_engine(api: openai.OpenAI, chat_bundle: Path) -> None:
    """Template, tokens, stop ids and the bundle's defaults: all as if done by hand."""
    tokenizer = ChatTokenizer.load(chat_bundle)
    prompt = tokenizer.encode_chat(QUESTION)
    engine = OnnxEngine.open(chat_bundle)
    params = SamplingParams(max_tokens=24, stop_token_ids=tokenizer.eos_token_ids)
    expected = engine.generate([prompt], params)[0]
    engine.close()

    answer = api.chat.completions.create(model="tiny-chat", messages=QUESTION)
    choice = answer.choices[0]
    assert choice.message.content == tokenizer.decode(expected.token_ids)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.system_fingerprint is not None


def test_a_stream_gives_the_same_answer(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model="tiny-chat", messages=QUESTION)
    chunks = list(
        api.chat.completions.create(
            model="tiny-chat",
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[0].delta.role == "assistant"
    assert all(choice.delta.role is None for choice in choices[1:])
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_the_raw_stream_follows_the_protocol(chat_url: str) -> None:
    body = {"model": "tiny-chat", "messages": QUESTION, "stream": True, "n": 2, "max_tokens": 3}
    with (
        client(chat_url) as http,
        http.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-request-id"].startswith("req_")
        text = response.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert '"usage"' not in text
    assert text.count('"finish_reason":"length"') == 2


def test_both_names_of_the_limit(api: openai.OpenAI) -> None:
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = api.chat.completions.create(
            model="tiny-chat", messages=QUESTION, **{limit: 5}, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"


def test_sampling_is_seeded_and_differs_by_choice(api: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = api.chat.completions.create(
            model="tiny-chat",
            messages=QUESTION,
            n=3,
            seed=seed,
            temperature=2.0,
            extra_body={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.1},
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) == 3


def test_penalties_and_bias_change_the_answer(api: openai.OpenAI) -> None:
    def ask(**fields: Any) -> str | None:
        answer = api.chat.completions.create(
            model="tiny-chat", messages=QUESTION, temperature=0, max_tokens=150, **fields
        )
        return answer.choices[0].message.content

    plain = ask()
    assert ask(presence_penalty=0, logit_bias={}) == plain
    assert ask(presence_penalty=2, frequency_penalty=2) != plain
    assert ask(extra_body={"dry_multiplier": 50, "dry_allowed_length": 1}) != plain
    forced = ask(logit_bias={"300": 100})
    assert forced is not None and forced != plain and len(set(forced.split())) <= 1


def test_top_p_zero_is_greedy(api: openai.OpenAI) -> None:
    greedy = api.chat.completions.create(model="tiny-chat", messages=QUESTION, temperature=0)
    narrow = api.chat.completions.create(
        model="tiny-chat", messages=QUESTION, temperature=2, top_p=0
    )
    assert narrow.choices[0].message.content == greedy.choices[0].message.content


def test_logprobs(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="tiny-chat", messages=QUESTION, logprobs=True, top_logprobs=3, max_tokens=6
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_roles_and_parts_of_text() -> None:
    body = ChatBody.model_validate(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
            ],
        }
    )
    assert [message.as_template_input for message in body.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
    ]


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny-chat"]
    assert api.models.retrieve("tiny-chat").owned_by == "lifecycle"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


def test_a_model_without_a_template_points_to_completions(stories_url: str) -> None:
    with openai.OpenAI(base_url=f"{stories_url}/v1", api_key="none", max_retries=0) as api:
        with pytest.raises(openai.BadRequestError, match="/v1/completions") as caught:
            api.chat.completions.create(model="stories", messages=QUESTION)
        assert caught.value.param == "messages"
