"""Who goes first, and for how long: `priority` and `timeout`."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from serving.service import Service
from serving.settings import ServerSettings
from tests.engines.clock import StepClock
from tests.serving.running import MakeService, client, order_of_ends, running, wait_until
from tests.serving.test_errors import error_of

BODY = {"model": "scripted", "prompt": "one", "max_tokens": 4}
CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "one"}], "max_tokens": 400}


def _order(service: Service, settings: ServerSettings, priorities: list[int]) -> list[int]:
    """The priorities in the order in which their requests end."""
    asked = [(None, BODY | {"priority": priority}) for priority in priorities]
    return [priorities[place] for place in order_of_ends(service, settings, asked)]


def test_those_who_step_back_end_last(make_service: MakeService) -> None:
    service = make_service(slots=1, max_queue=8)
    assert _order(service, ServerSettings(), [5, 9, 0, 2]) == [0, 2, 5, 9]


def test_only_an_operator_lets_requests_go_before_others(make_service: MakeService) -> None:
    service = make_service(slots=1, max_queue=8)
    settings = ServerSettings(allow_priority=True)
    assert _order(service, settings, [0, 0, -1]) == [-1, 0, 0]
    with running(make_service()) as url, client(url) as http:
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
            error = error_of(http.post(path, json=body | {"priority": -1}), 400)
            assert error["param"] == "priority"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]
)
def test_an_answer_ends_when_its_time_is_over(
    make_service: MakeService,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    stream: bool,
) -> None:
    service = make_service()
    StepClock(monkeypatch).times(service.backend, 1.0)  # type: ignore[attr-defined]
    fields = {"max_tokens": 400, "timeout": 25, "stream": stream}
    with running(service) as url, client(url) as http:
        response = http.post(path, json=body | fields).raise_for_status()
        if stream:
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length","stop_reason":"timeout"' in response.text
        else:
            (choice,) = response.json()["choices"]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "timeout")
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert "two" in text and response.json()["usage"]["completion_tokens"] == 25
        whole = http.post("/v1/completions", json=BODY | {"timeout": 60}).json()["choices"][0]
        assert whole["finish_reason"] == "length" and "stop_reason" not in whole


def test_one_whose_time_is_over_in_the_queue_is_told_so(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(slots=1)
    backend = service.backend  # type: ignore[attr-defined]
    StepClock(monkeypatch).times(backend, 1.0)
    backend.hold()
    with running(service) as url, client(url) as http, ThreadPoolExecutor(2) as pool:

        def ask(**fields: object) -> Future[httpx.Response]:
            return pool.submit(http.post, "/v1/completions", json=BODY | fields)

        long = ask(max_tokens=100)
        wait_until(lambda: backend.is_held)
        short = ask(timeout=5, echo=True, logprobs=1)
        wait_until(lambda: service.worker.num_unfinished == 2)
        backend.go()
        (choice,) = short.result().json()["choices"]
        assert choice["text"] == "one" and choice["stop_reason"] == "timeout"
        assert set(choice["logprobs"]["token_logprobs"]) == {None}
        assert long.result().json()["usage"]["completion_tokens"] == 100
