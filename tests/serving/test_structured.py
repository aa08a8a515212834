"""Answers that must be JSON, match a schema, a pattern or a grammar, or be one of a list: over HTTP."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema
import openai
import pytest

from lifecycle.engines.grammar.compiler import GrammarCompiler, GrammarLimits
from serving.grammars import MAX_COMPILING
from serving.service import open_service
from tests.engines.grammars import HOSTILE, PERSON
from tests.serving.running import client, running
from tests.serving.test_errors import CHAT, COMPLETIONS, error_of

QUESTION = [{"role": "user", "content": "Who is it?"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny-chat", "messages": QUESTION, "max_tokens": 250, "temperature": 1},
    COMPLETIONS: {"model": "tiny-chat", "prompt": "It is ", "max_tokens": 250, "temperature": 1},
}
PLAIN = {"name": "person", "schema": PERSON}
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def http(chat_url: str) -> Iterator[httpx.Client]:
    with client(chat_url) as made:
        yield made


def texts_of(response: httpx.Response) -> list[str]:
    """The answers of a response, all of which must be whole."""
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert all(choice["finish_reason"] == "stop" for choice in choices), response.text
    return [choice.get("text") or choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("json", OBJECT, r'\{"a": ?(true|false)\}'),
        ("json", json.dumps(OBJECT), r'\{"a": ?(true|false)\}'),
        ("json", True, None),
        ("regex", "(ab|cd){2}", "(ab|cd){2}"),
        ("choice", ["red", "grün"], "red|grün"),
        ("grammar", 'start: "<" /[a-c]{2}/ ">"', "<[a-c]{2}>"),
    ],
)
def test_all_names(
    http: httpx.Client, route: str, name: str, value: Any, pattern: str | None
) -> None:
    bodies = [
        BODIES[route] | {"structured_outputs": {name: value}, "seed": 0},
        BODIES[route] | {f"guided_{name}": value, "seed": 0},
    ]
    if pattern is None:
        assert all(http.post(route, json=body).status_code == 200 for body in bodies)
        return
    first, second = (texts_of(http.post(route, json=body)) for body in bodies)
    assert first == second and re.fullmatch(pattern, first[0])


def test_several_answers_each_have_their_own_place(http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": PLAIN}
    body = BODIES[CHAT] | {"response_format": form, "n": 4, "seed": 1}
    answers = texts_of(http.post(CHAT, json=body))
    for answer in answers:
        jsonschema.validate(json.loads(answer), PERSON)
    assert len(set(answers)) == 4
    body = BODIES[COMPLETIONS] | {"guided_json": PERSON, "prompt": ["a", "b"], "n": 2}
    for answer in texts_of(http.post(COMPLETIONS, json=body)):
        jsonschema.validate(json.loads(answer), PERSON)


def test_a_stream_gives_the_same(http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": PLAIN}
    body = BODIES[CHAT] | {"response_format": form, "n": 2, "seed": 3}
    whole = texts_of(http.post(CHAT, json=body))
    text = http.post(CHAT, json=body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    answers, reasons = ["", ""], [None, None]
    for choice in (choice for event in events for choice in event["choices"]):
        answers[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert answers == whole and reasons == ["stop", "stop"]


def test_the_official_client(chat_url: str) -> None:
    """`parse` sends what pydantic makes of a class, and reads the answer as one."""
    from pydantic import BaseModel, Field

    class Pet(BaseModel):
        name: str = Field(max_length=8)
        legs: int = Field(ge=0, le=8)

    with openai.OpenAI(base_url=f"{chat_url}/v1", api_key="none", max_retries=0) as api:
        answer = api.chat.completions.parse(
            model="tiny-chat", messages=QUESTION, response_format=Pet, temperature=1, seed=1
        )
        parsed = answer.choices[0].message.parsed
        assert parsed is not None and 0 <= parsed.legs <= 8


def test_any_json_object(http: httpx.Client) -> None:
    """It holds whatever the model makes of it, unless it is cut."""
    body = BODIES[CHAT] | {"response_format": {"type": "json_object"}, "n": 4}
    choices = http.post(CHAT, json=body).json()["choices"]
    for choice in choices:
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    text = BODIES[CHAT] | {"response_format": {"type": "text"}, "guided_choice": ["x"]}
    assert texts_of(http.post(CHAT, json=text)) == ["x"]


def test_a_cut_answer_says_so(http: httpx.Client) -> None:
    body = BODIES[CHAT] | {"guided_json": PERSON, "max_tokens": 10}
    choice = http.post(CHAT, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_no_end_of_turn_before_the_end(http: httpx.Client) -> None:
    """Neither the model's, nor the template's, nor one that the request names."""
    for fields in ({"logit_bias": {"2": 100, "0": 100}}, {"stop_token_ids": [90]}, {"stop": []}):
        body = BODIES[CHAT] | {"guided_json": OBJECT, "max_tokens": 40} | fields
        assert re.fullmatch(r'\{"a": ?(true|false)\}', texts_of(http.post(CHAT, json=body))[0])
    body = BODIES[CHAT] | {"guided_regex": "a{1,60}", "max_tokens": 80, "ignore_eos": True}
    assert texts_of(http.post(CHAT, json=body)) == ["a" * 60]


def test_log_probabilities_of_every_token(http: httpx.Client) -> None:
    body = BODIES[CHAT] | {"guided_json": PERSON, "logprobs": True, "top_logprobs": 2}
    answer = http.post(CHAT, json=body).json()
    logprobs = answer["choices"][0]["logprobs"]["content"]
    assert len(logprobs) == answer["usage"]["completion_tokens"]


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needed"),
        (
            {"response_format": {"type": "text", "json_schema": PLAIN}},
            "response_format.json_schema",
            "only allowed",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            SCHEMA,
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": PLAIN | {"schema": []}}},
            SCHEMA,
            "must be a JSON schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": PLAIN | {"schema": {"not": {}}},
                }
            },
            SCHEMA,
            "'not' at '/'",
        ),
        ({"guided_json": {"items": {"uniqueItems": True}}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"$ref": "http://localhost/x"}}, "guided_json", "nothing is fetched"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": 5}, "guided_json", "must be a JSON schema"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": "a"}, "guided_choice", "list"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "x"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "exactly one",
        ),
        (
            {"structured_outputs": {"regexp": "a"}},
            "structured_outputs.regexp",
            "did you mean 'regex'",
        ),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "not together with guided_json"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "not together with response_format",
        ),
    ],
)
def test_wrong_fields(http: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    error = error_of(http.post(CHAT, json=BODIES[CHAT] | fields), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert texts_of(http.post(CHAT, json=BODIES[CHAT] | {"guided_choice": ["x"]})) == ["x"]


def test_hostile_grammars_hold_up_nobody(http: httpx.Client, chat_url: str) -> None:
    """While they are refused, one after another, others get their answers."""
    names = {"json_schema": "guided_json", "regex": "guided_regex", "lark": "guided_grammar"}
    statuses: list[int] = []

    def ask(kind: str, value: Any) -> None:
        with client(chat_url) as own:
            body = BODIES[CHAT] | {names[kind]: value}
            statuses.append(own.post(CHAT, json=body).status_code)

    free = {"model": "tiny-chat", "messages": QUESTION, "max_tokens": 4}
    # A new grammar would have to wait for its turn.
    known = BODIES[CHAT] | {"guided_choice": ["x"]}
    assert texts_of(http.post(CHAT, json=known)) == ["x"]
    threads = [threading.Thread(target=ask, args=pair) for pair in HOSTILE.values()]
    for thread in threads:
        thread.start()
    answered = 0
    while any(thread.is_alive() for thread in threads):
        assert http.post(CHAT, json=free).status_code == 200
        assert texts_of(http.post(CHAT, json=known)) == ["x"]
        answered += 1
    assert set(statuses) <= {400, 503} and statuses.count(400) >= MAX_COMPILING
    # Whoever waited for each of them would be answered once in its time.
    assert answered > 2 * len(HOSTILE)


def test_a_grammar_that_outgrows_its_limits_is_the_clients_error(
    chat_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an answer, whole or as a stream."""
    small = partial(GrammarCompiler, limits=GrammarLimits(lexer_states=60))
    monkeypatch.setattr("serving.grammars.GrammarCompiler", small)
    body = BODIES[CHAT] | {"guided_regex": "[ab]*a[ab]{30}", "ignore_eos": True}
    with running(open_service(chat_bundle)) as url, client(url) as http:
        error = error_of(http.post(CHAT, json=body), 400)
        assert error["type"] == "invalid_request_error" and "outgrown" in error["message"]
        last = http.post(CHAT, json=body | {"stream": True}).text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"] == error
        assert http.post(CHAT, json=BODIES[CHAT] | {"max_tokens": 2}).status_code == 200


def test_a_grammar_that_leaves_no_token_is_the_clients_mistake(http: httpx.Client) -> None:
    body = BODIES[CHAT] | {"guided_grammar": "start: <[2]>"}
    assert "no token may come next" in error_of(http.post(CHAT, json=body), 400)["message"]


def test_a_body_that_is_deep(http: httpx.Client) -> None:
    text = json.dumps(BODIES[CHAT] | {"guided_json": "?"})
    for depth in (500, 100_000):
        deep = '{"items":' * depth + "{}" + "}" * depth
        headers = {"content-type": "application/json"}
        response = http.post(CHAT, content=text.replace('"?"', deep), headers=headers)
        error_of(response, 400)


def test_without_the_library_only_such_requests_are_refused(
    chat_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with running(open_service(chat_bundle)) as url, client(url) as http:
        error = error_of(http.post(CHAT, json=BODIES[CHAT] | {"guided_choice": ["a"]}), 400)
        assert error["param"] == "guided_choice"
        assert "pip install 'lifecycle-toolkit[serve]'" in error["message"]
        assert http.post(CHAT, json=BODIES[CHAT] | {"max_tokens": 2}).status_code == 200
