"""Whatever a client sends wrong, it gets one clear error in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.schemas import ChatBody, CompletionBody
from tests.serving.running import client

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
VALID = {
    CHAT: {"model": "tiny-chat", "messages": MESSAGES, "max_tokens": 1},
    COMPLETIONS: {"model": "tiny-chat", "prompt": "hi", "max_tokens": 1},
}


@pytest.fixture(scope="module")
def http(chat_url: str) -> Iterator[httpx.Client]:
    with client(chat_url) as made:
        yield made


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, its form checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -0.1}, "temperature", "greater"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 1.5}, "top_p", "less"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"n": 0}, "n", "greater"),
        ({"n": 16384}, "n", "less"),
        ({"n": 100}, None, "at most"),
        ({"seed": 2**63}, "seed", "less"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ["x" * 257]}, "stop[0]", "at most 256"),
        ({"stop_token_ids": [-1]}, None, "token id -1"),
        ({"stop_token_ids": [10**30]}, None, "token id"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
        ({"logit_bias": {"fox": 1}}, "logit_bias", "'fox' is no token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "less than or equal to 100"),
        ({"logit_bias": {"9999999": 1}}, None, "logit_bias has the token id 9999999"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "'05' is no token id"),
        ({"logit_bias": {str(n): "" for n in range(2000)}}, "logit_bias", "more than 1024"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "the answer may have 8 tokens"),
        ({"dry_allowed_length": 2**63}, "dry_allowed_length", "less than or equal to 64"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"priority": -1}, "priority", "takes 0 or more"),
        ({"priority": 2**31}, "priority", "less than"),
        ({"timeout": 0}, "timeout", "greater than 0"),
        ({"timeout": 1e9}, "timeout", "less than"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ],
)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_wrong_fields(
    http: httpx.Client, route: str, fields: dict[str, Any], param: str | None, words: str
) -> None:
    error = error_of(http.post(route, json=VALID[route] | fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_wrong_chats(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert error_of(http.post(CHAT, json=VALID[CHAT] | fields), 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": [10**40]}, None),
        ({"prompt": "", "max_tokens": 4}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 100}, None),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1, "echo": True, "stream": True}, "echo"),
        ({"prompt": [[5] * 200] * 20, "prompt_logprobs": 20}, None),
    ],
)
def test_wrong_completions(http: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    error = error_of(http.post(COMPLETIONS, json=VALID[COMPLETIONS] | fields), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [1] * 5000},
        {"messages": MESSAGES * 5000},
        {"prompt": ["x"] * 5000},
        {"prompt": [[1]] * 5000},
        {"prompt": ["x", "\ud800"]},
        {"stop": [1] * 5000},
    ],
)
def test_a_long_list_costs_one_error(fields: dict[str, Any]) -> None:
    body, route = (ChatBody, CHAT) if "messages" in fields else (CompletionBody, COMPLETIONS)
    with pytest.raises(ValidationError) as caught:
        body.model_validate(VALID[route] | fields)
    (error,) = caught.value.errors()
    assert error["loc"] == tuple(fields)


def test_a_long_name_is_not_sent_back(http: httpx.Client) -> None:
    body = VALID[CHAT] | {"x" * 1_000_000: 1}
    assert len(error_of(http.post(CHAT, json=body), 400)["message"]) < 100
    body = VALID[CHAT] | {"model": "x" * 1_000_000}
    assert len(error_of(http.post(CHAT, json=body), 404)["message"]) < 300


def test_null_is_the_default(http: httpx.Client) -> None:
    nulls = dict.fromkeys(("temperature", "stop", "n", "stream", "logprobs", "seed", "user"))
    assert http.post(CHAT, json=VALID[CHAT] | nulls).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": ', "Expecting value at character 10"),
        (b"\xff\xfe", "Expecting value at character 0"),
        (b"\xff\xfe{", "byte 2 is no UTF-16"),
        (b'{"a": "\xff"}', "byte 7 is no UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_a_body_that_is_no_json_is_told_why(http: httpx.Client, body: bytes, words: str) -> None:
    response = http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    message = error_of(response, 400)["message"]
    assert words in message and "999" not in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"text"',
        b'{"model": "tiny-chat", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny-chat", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny-chat", "prompt": "\\ud800"}',
        b'{"model": "tiny-chat", "prompt": "a", "stop": "\\udfff"}',
        b'{"model": "tiny-chat", "prompt": "a", "\\ud800": 1}',
    ],
)
def test_broken_bodies(http: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    error_of(http.post(COMPLETIONS, content=body, headers=headers), 400)
    assert http.post(COMPLETIONS, json=VALID[COMPLETIONS]).status_code == 200


def test_only_json(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error_of(http.post(CHAT, content=b"{}", headers={"Content-Type": kind}), 415)
    gzipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    error_of(http.post(CHAT, content=b"x", headers=gzipped), 415)


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert "/v1/nothing" in error_of(http.get("/v1/nothing"), 404)["message"]
    error_of(http.get("/v1/models/"), 404)
    response = http.get(CHAT)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_an_unknown_model(http: httpx.Client) -> None:
    for route, body in VALID.items():
        error = error_of(http.post(route, json=body | {"model": "gpt-9"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "tiny-chat" in error["message"]


def test_a_prompt_longer_than_the_context(http: httpx.Client) -> None:
    long = "fox jumps " * 600
    for route, body in (
        (CHAT, {"messages": [{"role": "user", "content": long}], "max_tokens": None}),
        (COMPLETIONS, {"prompt": long}),
        (COMPLETIONS, {"prompt": [5] * 512}),
        (COMPLETIONS, {"max_tokens": 10**18}),
        (CHAT, {"max_tokens": 512}),
    ):
        response = http.post(route, json=VALID[route] | body)
        error = error_of(response, 400)
        assert error["code"] == "context_length_exceeded"
        asked = (VALID[route] | body).get("max_tokens")
        said = "the answer needs one at least" if asked is None else f"{asked} are asked for"
        assert said in error["message"]
        assert response.headers["x-should-retry"] == "false"
    fits = {"prompt": [5] * 511, "max_tokens": 1}
    assert http.post(COMPLETIONS, json=VALID[COMPLETIONS] | fits).status_code == 200


FIELDS = [
    "max_tokens",
    "n",
    "seed",
    "top_k",
    "logprobs",
    "best_of",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "prompt",
    "frequency_penalty",
    "typical_p",
    "dry_allowed_length",
    "dry_multiplier",
    "dry_base",
    "min_tokens",
    "logit_bias",
    "priority",
    "timeout",
    "prompt_logprobs",
]
INTEGERS = st.integers() | st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**100])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    field=st.sampled_from(FIELDS),
    value=INTEGERS,
)
def test_no_integer_harms_the_server(http: httpx.Client, field: str, value: int) -> None:
    sent = [value] if field in ("stop_token_ids", "prompt") else value
    response = http.post(COMPLETIONS, json=VALID[COMPLETIONS] | {field: sent})
    if response.status_code != 200:
        error_of(response, 400)
    assert http.get("/livez").status_code == 200
