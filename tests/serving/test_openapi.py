"""Requests and responses against OpenAI's own specification."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from jsonschema import Draft202012Validator

from serving.schemas import ChatBody, CompletionBody
from tests.serving.running import client

Validate = Callable[[str, Any], None]

CHAT = {"model": "tiny-chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
COMPLETION = {"model": "tiny-chat", "prompt": "hi", "max_tokens": 3}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def components(data_dir: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = (data_dir / "openai_openapi" / "openapi.yaml").read_text(encoding="utf-8")
    return _json_schema(yaml.load(text, loader)["components"])


@pytest.fixture(scope="module")
def validate(components: dict[str, Any]) -> Validate:
    def check(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": components}
        Draft202012Validator(schema).validate(value)

    return check


def _json_schema(node: Any) -> Any:
    """OpenAPI's `nullable` in the words of JSON Schema."""
    if isinstance(node, list):
        return [_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _json_schema(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


@pytest.mark.parametrize("extra", [{}, {"n": 2, "logprobs": True, "top_logprobs": 2}])
def test_chat_completions(chat_url: str, validate: Validate, extra: dict[str, Any]) -> None:
    with client(chat_url) as http:
        answer = http.post("/v1/chat/completions", json=CHAT | extra).json()
        validate("CreateChatCompletionResponse", answer)
        for chunk in _chunks(http, "/v1/chat/completions", CHAT | extra | USAGE):
            validate("CreateChatCompletionStreamResponse", chunk)


@pytest.mark.parametrize("extra", [{}, {"n": 2, "logprobs": 2}, {"echo": True}])
def test_completions(chat_url: str, validate: Validate, extra: dict[str, Any]) -> None:
    with client(chat_url) as http:
        answer = http.post("/v1/completions", json=COMPLETION | extra).json()
        validate("CreateCompletionResponse", answer)
        *chunks, last = _chunks(http, "/v1/completions", COMPLETION | extra | USAGE)
        # The specification has one schema for the whole and its chunks and knows only that of
        # the whole, whose finish_reason and usage are never null.
        for chunk in chunks[:-1]:
            assert all(choice["finish_reason"] is None for choice in chunk["choices"][:-1])
        validate("CreateCompletionResponse", last)


def test_models_and_errors(chat_url: str, validate: Validate) -> None:
    with client(chat_url) as http:
        validate("ListModelsResponse", http.get("/v1/models").json())
        validate("Model", http.get("/v1/models/tiny-chat").json())
        for response in (http.get("/nowhere"), http.post("/v1/completions", json={})):
            validate("ErrorResponse", response.json())


def test_every_field_of_the_specification_is_known(components: dict[str, Any]) -> None:
    for name, body in (
        ("CreateChatCompletionRequest", ChatBody),
        ("CreateCompletionRequest", CompletionBody),
    ):
        assert _properties(components, {"$ref": f"/{name}"}) <= body.model_fields.keys()


def _properties(components: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    if "$ref" in schema:
        return _properties(components, components["schemas"][schema["$ref"].rpartition("/")[2]])
    parts = [_properties(components, part) for part in schema.get("allOf", [])]
    return set(schema.get("properties", {})).union(*parts)


def _chunks(http: httpx.Client, route: str, body: dict[str, Any]) -> list[Any]:
    with http.stream("POST", route, json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
