"""Who goes first, and for how long: `priority` and `timeout`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from serving.service import Service
from serving.settings import ServerSettings
from tests.serving.conftest import MakeService
from tests.serving.running import client, running
from tests.serving.test_errors import error_of

BODY = {"model": "scripted", "prompt": "one", "max_tokens": 4}
CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "one"}], "max_tokens": 400}


def _order(service: Service, settings: ServerSettings, priorities: list[int]) -> list[int]:
    """Which of several requests, sent while the first of them runs, end first."""
    backend = service.backend  # type: ignore[attr-defined]
    backend.gate.clear()
    # Answers are told apart by when they come.
    backend.step_seconds = 0.05
    ends: list[int] = []

    def ask(url: str, priority: int) -> None:
        with client(url) as http:
            http.post("/v1/completions", json=BODY | {"priority": priority}).raise_for_status()
        ends.append(priority)

    with running(service, settings) as url, ThreadPoolExecutor(8) as pool:
        asked = []
        for number, priority in enumerate(priorities):
            asked.append(pool.submit(ask, url, priority))
            while service.worker.num_unfinished <= number:
                time.sleep(0.01)
        backend.gate.set()
        for each in asked:
            each.result()
    return ends


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
    make_service: MakeService, path: str, body: dict[str, Any], stream: bool
) -> None:
    service = make_service()
    service.backend.step_seconds = 0.02  # type: ignore[attr-defined]
    fields = {"max_tokens": 400, "timeout": 0.5, "stream": stream}
    with running(service) as url, client(url) as http:
        began = time.monotonic()
        response = http.post(path, json=body | fields).raise_for_status()
        assert 0.4 < time.monotonic() - began < 5
        if stream:
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length","stop_reason":"timeout"' in response.text
        else:
            (choice,) = response.json()["choices"]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "timeout")
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert "two" in text and 0 < response.json()["usage"]["completion_tokens"] < 400
        whole = http.post("/v1/completions", json=BODY | {"timeout": 60}).json()["choices"][0]
        assert whole["finish_reason"] == "length" and "stop_reason" not in whole


def test_one_whose_time_is_over_in_the_queue_is_told_so(make_service: MakeService) -> None:
    service = make_service(slots=1)
    service.backend.step_seconds = 0.02  # type: ignore[attr-defined]
    with running(service) as url, client(url) as http, ThreadPoolExecutor(1) as pool:
        long = pool.submit(http.post, "/v1/completions", json=BODY | {"max_tokens": 100})
        while not service.worker.num_unfinished:
            time.sleep(0.01)
        fields = {"timeout": 0.1, "echo": True, "logprobs": 1}
        (choice,) = http.post("/v1/completions", json=BODY | fields).json()["choices"]
        assert choice["text"] == "one" and choice["stop_reason"] == "timeout"
        assert set(choice["logprobs"]["token_logprobs"]) == {None}
        assert isinstance(long.result(), httpx.Response)
