"""`/v1/completions` on a real model over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifecycle.data.chat import ChatTokenizer
from tests.serving.running import client
from tests.serving.test_text import reference

GREEDY = {"model": "stories", "temperature": 0}


@pytest.fixture(scope="module")
def api(stories_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stories_url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(stories_url: str) -> Iterator[httpx.Client]:
    with client(stories_url) as made:
        yield made


@pytest.fixture(scope="module")
def golden(data_dir: Path) -> dict[str, Any]:
    path = data_dir / "stories260K" / "expected_greedy.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def story(golden: dict[str, Any]) -> str:
    """The published greedy text; its first 200 tokens."""
    return golden["expected_stdout_200_steps"]


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json=GREEDY | fields)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = GREEDY | fields | {"stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_the_published_text_comes_out(
    api: openai.OpenAI, stories_bundle: Path, golden: dict[str, Any], story: str
) -> None:
    ids = golden["greedy_ids_numpy"]
    answer = api.completions.create(
        model="stories", prompt=ids[:1], temperature=0, max_tokens=len(ids) - 1
    )
    text = answer.choices[0].text
    assert text == ChatTokenizer.load(stories_bundle).decode(ids)
    assert text.startswith(story)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ids) - 1


def test_an_answer_keeps_the_space_to_its_prompt(http: httpx.Client, story: str) -> None:
    for echo in (False, True):
        (choice,) = complete(http, prompt="Once", max_tokens=3, echo=echo)["choices"]
        text = choice["text"] if echo else "Once" + choice["text"]
        assert text == "Once upon a time" == story[: len(text)]


def test_the_published_text_comes_out_as_a_stream(api: openai.OpenAI, story: str) -> None:
    chunks = list(
        api.completions.create(
            model="stories",
            prompt="Once upon a time",
            temperature=0,
            max_tokens=150,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "Once upon a time" + "".join(c.choices[0].text for c in chunks if c.choices)
    assert story.startswith(text)
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 150


def test_the_text_does_not_depend_on_the_neighbours(stories_url: str, story: str) -> None:
    """Eight requests together, in the slots of one batch, each against itself alone."""
    names = ["a girl", "the dog", "one boy", "two cats", "Lily", "Tom", "she"]
    prompts = ["Once upon a time", *(f"The day when {name}" for name in names)]

    async def ask(api: openai.AsyncOpenAI, prompt: str) -> str:
        answer = await api.completions.create(
            model="stories", prompt=prompt, temperature=0, max_tokens=60
        )
        return answer.choices[0].text

    async def main() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{stories_url}/v1", api_key="none") as api:
            alone = [await ask(api, prompt) for prompt in prompts]
            together = await asyncio.gather(*(ask(api, prompt) for prompt in prompts))
            return alone, list(together)

    alone, together = asyncio.run(main())
    assert together == alone
    assert story.startswith(prompts[0] + together[0])


def test_a_prompt_has_four_forms(http: httpx.Client) -> None:
    text = complete(http, prompt="Once upon a time", logprobs=0)
    ids = [1, 403, 407, 261, 378]
    whole = complete(http, prompt=ids)["choices"]
    assert [c["text"] for c in complete(http, prompt=[ids, ids])["choices"]] == [
        whole[0]["text"]
    ] * 2
    pair = complete(http, prompt=["Once upon a time", "The dog"])["choices"]
    assert [c["index"] for c in pair] == [0, 1]
    assert pair[0]["text"] == text["choices"][0]["text"]
    assert pair[1]["text"] == complete(http, prompt="The dog")["choices"][0]["text"]


def test_the_default_length_is_that_of_the_api(http: httpx.Client) -> None:
    assert complete(http, prompt="Once")["usage"]["completion_tokens"] == 16


def test_n_answers_have_their_own_seeds(http: httpx.Client) -> None:
    sampled = {"prompt": ["Once", "The"], "n": 2, "temperature": 1.0, "seed": 7, "max_tokens": 12}
    first, again = complete(http, **sampled), complete(http, **sampled)
    assert [c["index"] for c in first["choices"]] == [0, 1, 2, 3]
    texts = [c["text"] for c in first["choices"]]
    assert texts == [c["text"] for c in again["choices"]]
    assert texts[0] != texts[1]
    single = complete(http, **sampled | {"prompt": "Once", "n": 1})
    assert single["choices"][0]["text"] == texts[0]
    by_index: dict[int, str] = {}
    for chunk in streamed(http, **sampled):
        for choice in chunk["choices"]:
            by_index[choice["index"]] = by_index.get(choice["index"], "") + choice["text"]
    assert by_index == dict(enumerate(texts))


def test_echo_repeats_the_prompt(http: httpx.Client) -> None:
    plain = complete(http, prompt="Once upon")["choices"][0]["text"]
    assert complete(http, prompt="Once upon", echo=True)["choices"][0]["text"] == (
        "Once upon" + plain
    )
    chunks = streamed(http, prompt="Once upon", echo=True)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Once upon" + plain


def test_logprobs_belong_to_the_tokens_of_the_text(http: httpx.Client) -> None:
    choice = complete(http, prompt="Once upon a time", logprobs=2, max_tokens=8)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["tokens"]) == 8
    for token, value, top, offset in zip(
        logprobs["tokens"],
        logprobs["token_logprobs"],
        logprobs["top_logprobs"],
        logprobs["text_offset"],
        strict=True,
    ):
        assert choice["text"][offset:].startswith(token)
        assert len(top) == 2 and top[token] == value == max(top.values()) <= 0
    pieces = streamed(http, prompt="Once upon a time", logprobs=2, max_tokens=8)
    tokens = [t for c in pieces for t in c["choices"][0]["logprobs"]["tokens"]]
    assert tokens == logprobs["tokens"]


def test_stop_token_ids_and_eos(http: httpx.Client) -> None:
    comma = 432
    text = complete(http, prompt="Once upon a time", logprobs=0, max_tokens=20)["choices"][0]
    stopped = complete(http, prompt="Once upon a time", stop_token_ids=[comma], max_tokens=20)
    choice = stopped["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert text["text"].startswith(choice["text"])
    assert len(choice["text"]) < len(text["text"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_stop_strings_cut_alike_with_and_without_a_stream(
    http: httpx.Client, data: st.DataObject
) -> None:
    full = complete(http, prompt="Once upon a time", max_tokens=40)["choices"][0]["text"]
    place = st.integers(0, len(full) - 1)
    slices = st.tuples(place, st.integers(1, 6)).map(lambda s: full[s[0] : s[0] + s[1]])
    stops = data.draw(st.lists(slices | st.text("xyz", min_size=1), min_size=1, max_size=4))
    fields = {"prompt": "Once upon a time", "max_tokens": 40, "stop": stops}
    whole = complete(http, **fields)["choices"][0]
    chunks = [chunk["choices"][0] for chunk in streamed(http, **fields)]
    text, stopped = reference(full, stops)
    assert whole["text"] == "".join(chunk["text"] for chunk in chunks) == text
    assert (
        whole["finish_reason"] == chunks[-1]["finish_reason"] == ("stop" if stopped else "length")
    )
    assert all(chunk["finish_reason"] is None for chunk in chunks[:-1])
