"""Log-probabilities of prompts, and answers chosen by theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.sampling import log_softmax
from tests.serving.running import client
from tests.serving.test_completions import complete, streamed

TEXT = "Once upon a time there was a little girl"


@pytest.fixture(scope="module")
def http(stories_url: str) -> Iterator[httpx.Client]:
    with client(stories_url) as made:
        yield made


class Reference:
    """What the model says of each token of a text, computed by itself."""

    def __init__(self, bundle: Path) -> None:
        self.tokenizer = ChatTokenizer.load(bundle)
        self.engine = OnnxEngine.open(bundle)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def logprobs(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Of all tokens at each place of `ids` but the first."""
        return np.stack([log_softmax(row) for row in self.engine.logits(ids)[:-1]])


@pytest.fixture(scope="module")
def model(stories_bundle: Path) -> Reference:
    return Reference(stories_bundle)


def test_an_echo_brings_the_scores_of_the_prompt(http: httpx.Client, model: Reference) -> None:
    ids = model.ids(TEXT)
    wanted = model.logprobs(ids)
    fields = {"logprobs": 2, "echo": True, "max_tokens": 3}
    plain = complete(http, prompt=TEXT, logprobs=2, max_tokens=3)["choices"][0]
    for prompt, text in ((TEXT, TEXT), (ids, model.tokenizer.decode(ids))):
        (choice,) = complete(http, prompt=prompt, **fields)["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"] == text + plain["text"]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        count = len(ids)
        assert len(logprobs["tokens"]) == count + 3
        for place, (id, row) in enumerate(zip(ids[1:], wanted, strict=True), start=1):
            assert logprobs["token_logprobs"][place] == pytest.approx(row[id], abs=1e-4)
            assert max(logprobs["top_logprobs"][place].values()) == pytest.approx(
                row.max(), abs=1e-4
            )
            assert len(logprobs["top_logprobs"][place]) == 2
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert logprobs[name][count:] == plain["logprobs"][name]
        places = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))
        # The first one begins the text and is none of it, and the space of the second is not shown.
        assert places[:2] == [("<s>", 0), (" Once", 0)]
        for token, offset in places[2:]:
            assert choice["text"][offset:].startswith(token)


def test_a_prompt_alone_can_be_scored(http: httpx.Client, model: Reference) -> None:
    ids = model.ids(TEXT)
    answer = complete(http, prompt=ids, logprobs=0, echo=True, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == model.tokenizer.decode(ids) and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 0,
        "total_tokens": len(ids),
        "prompt_tokens_details": answer["usage"]["prompt_tokens_details"],
    }
    (bare,) = complete(http, prompt=ids, echo=True, max_tokens=0)["choices"]
    assert bare["text"] == choice["text"] and bare["logprobs"] is None
    # All of the context, with no room for an answer.
    whole = complete(http, prompt=ids[:1] + [403] * 511, echo=True, logprobs=0, max_tokens=0)
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == 512
    assert (
        "".join(
            c["choices"][0]["text"] for c in streamed(http, prompt=TEXT, echo=True, max_tokens=0)
        )
        == TEXT
    )


def test_continuations_are_scored_as_lm_evaluation_harness_does(
    http: httpx.Client, model: Reference, stories_bundle: Path
) -> None:
    """One token is generated and left out, by position: also where it ends the text."""
    pairs = [("Once upon a", " time"), ("Once upon a", " dragon"), ("She was happy", ".")]
    prompts, starts, wanted = list[list[int]](), list[int](), list[float]()
    ends: list[int] = []
    for context, continuation in pairs:
        ids, start = model.ids(context + continuation), len(model.ids(context))
        rows = model.logprobs(ids)
        prompts.append(ids)
        starts.append(start)
        wanted.append(sum(float(rows[place - 1][ids[place]]) for place in range(start, len(ids))))
        ends.append(int(model.engine.logits(ids)[-1].argmax()))
    for stops in ([], sorted(set(ends))):
        answer = complete(
            http, prompt=prompts, logprobs=1, echo=True, max_tokens=1, stop_token_ids=stops
        )
        greedy: list[bool] = []
        for choice, start, score in zip(answer["choices"], starts, wanted, strict=True):
            assert choice["finish_reason"] == ("stop" if stops else "length")
            found = choice["logprobs"]["token_logprobs"][start:-1]
            assert sum(found) == pytest.approx(score, abs=1e-3)
            tops = choice["logprobs"]["top_logprobs"][start:-1]
            pairs_of = zip(found, tops, strict=True)
            greedy.append(all(max(top.values()) == own for own, top in pairs_of))
        assert greedy[:2] == [True, False]


def test_prompt_logprobs_are_those_of_vllm(http: httpx.Client, model: Reference) -> None:
    ids = model.ids(TEXT)
    rows = model.logprobs(ids)
    answer = complete(http, prompt=TEXT, prompt_logprobs=2, max_tokens=1, n=2, temperature=1)
    for choice in answer["choices"]:
        first, *others = choice["prompt_logprobs"]
        assert first is None and len(others) == len(ids) - 1
        for id, row, entry in zip(ids[1:], rows, others, strict=True):
            ranks = {str(other): n for n, other in enumerate(np.argsort(-row)[:2], start=1)}
            ranks[str(id)] = 1 + int((row > row[id]).sum())
            assert {other: entry[other]["rank"] for other in entry} == ranks
            for other in entry:
                assert entry[other]["logprob"] == pytest.approx(row[int(other)], abs=1e-4)
        words = [e[str(id)]["decoded_token"] for id, e in zip(ids[1:], others, strict=True)]
        assert "".join(words).strip() == TEXT
    assert "prompt_logprobs" not in complete(http, prompt=TEXT, max_tokens=1)["choices"][0]


def test_chats_have_prompt_logprobs_too(chat_url: str, chat_bundle: Path) -> None:
    messages = [{"role": "user", "content": "fox"}]
    ids = ChatTokenizer.load(chat_bundle).encode_chat(messages)
    rows = Reference(chat_bundle).logprobs(ids)
    with client(chat_url) as http:
        body = {"model": "tiny-chat", "messages": messages, "prompt_logprobs": 0, "max_tokens": 2}
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    first, *others = answer["prompt_logprobs"]
    assert first is None
    for id, row, entry in zip(ids[1:], rows, others, strict=True):
        assert entry.keys() == {str(id)}
        assert entry[str(id)]["logprob"] == pytest.approx(row[id], abs=1e-4)


def test_the_best_answers_come_first(http: httpx.Client) -> None:
    sampled = {"prompt": ["Once", "The dog"], "temperature": 1.5, "seed": 5, "max_tokens": 8}
    every = complete(http, **sampled, n=6, logprobs=0)["choices"]
    answer = complete(http, **sampled, best_of=6, n=2, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts: list[str] = []
    for start, prompt in ((0, "Once"), (6, "The dog")):
        group = every[start : start + 6]
        assert all(choice["finish_reason"] == "length" for choice in group)
        group.sort(key=lambda c: -float(np.mean(c["logprobs"]["token_logprobs"])))
        texts += [prompt + choice["text"] for choice in group[:2]]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 6 * 8


def test_completions_take_a_form(http: httpx.Client) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"enum": ["red", "green"]}},
    }
    text = complete(http, prompt="Once", response_format=form)["choices"][0]["text"]
    assert text in ('"red"', '"green"')


def test_too_many_scores_are_refused(http: httpx.Client) -> None:
    ids = [1, *[403] * 399]
    body = {"model": "stories", "prompt": [ids] * 10, "echo": True, "max_tokens": 0}
    response = http.post("/v1/completions", json=body | {"prompt_logprobs": 20})
    assert response.status_code == 400
    assert "84000 log-probabilities of prompts; 65536 are given" in response.text
    assert http.post("/v1/completions", json=body | {"prompt_logprobs": 10}).status_code == 200
