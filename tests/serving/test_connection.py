"""Busy, leaving, failing and slow: the server and its clients at their limits."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from lifecycle.errors import EngineError
from serving.server import bind
from serving.service import Service
from serving.settings import ServerSettings
from tests.serving.running import MakeService, client, in_background, served, wait_until
from tests.serving.scripted import ScriptedBackend
from tests.serving.test_errors import error_of

ROUTE = "/v1/completions"
LONG = {"model": "scripted", "prompt": "x", "max_tokens": 400}
SHORT = LONG | {"max_tokens": 4}


def test_a_response_waits_for_no_acknowledgement() -> None:
    async def has_no_delay() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accept, sock=listener):
                with socket.create_connection(listener.getsockname()[:2]):
                    return await accepted

    assert asyncio.run(has_no_delay())


def test_a_full_queue_refuses_at_once(make_service: MakeService) -> None:
    with served(make_service, slots=1, max_queue=1) as (http, service, backend):
        backend.hold()
        waiting = [in_background(lambda: http.post(ROUTE, json=SHORT)) for _ in range(2)]
        wait_until(lambda: service.worker.num_unfinished == 2)
        response = http.post(ROUTE, json=SHORT)
        assert error_of(response, 503)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert http.get("/readyz").status_code == 200
        backend.go()
        for thread, results in waiting:
            thread.join()
            assert results[0].status_code == 200


def test_a_client_that_leaves_a_stream_frees_its_slot(make_service: MakeService) -> None:
    with served(make_service, slots=1) as (http, service, backend):
        backend.hold(after=2)
        with http.stream("POST", ROUTE, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            wait_until(lambda: backend.is_held)
            assert service.worker.num_unfinished == 1
        check_freed(http, service, backend)


def check_freed(http: httpx.Client, service: Service, backend: ScriptedBackend) -> None:
    """Nothing is left of the request whose step is held, and its slot is another's at once."""
    wait_until(lambda: service.worker.num_unfinished == 0)
    backend.go()
    assert http.post(ROUTE, json=SHORT).status_code == 200
    assert backend.num_steps < 20


def test_a_client_that_leaves_before_the_answer_frees_its_slot(make_service: MakeService) -> None:
    with served(make_service, slots=1) as (http, service, backend):
        backend.hold(after=2)
        with raw_request(http, ROUTE, LONG):
            wait_until(lambda: backend.is_held)
            assert service.worker.num_unfinished == 1
        check_freed(http, service, backend)


def test_a_client_that_leaves_while_it_waits_frees_its_place(make_service: MakeService) -> None:
    with served(make_service, slots=1, max_queue=1) as (http, service, backend):
        backend.hold()
        thread, results = in_background(lambda: http.post(ROUTE, json=SHORT))
        wait_until(lambda: backend.is_held)
        with raw_request(http, ROUTE, LONG | {"stream": True}):
            wait_until(lambda: service.worker.num_unfinished == 2)
        backend.go()
        thread.join()
        assert results[0].status_code == 200
        wait_until(lambda: service.worker.num_unfinished == 0)


def test_a_failed_step_is_a_plain_500(make_service: MakeService) -> None:
    with served(make_service) as (http, _, backend):
        backend.failure = EngineError("secret address 0x7f00")
        response = http.post(ROUTE, json=SHORT)
        error = error_of(response, 500)
        assert "0x7f00" not in response.text
        assert response.headers["x-request-id"] in error["message"]
        assert http.post(ROUTE, json=SHORT).status_code == 200


def test_a_bug_is_a_plain_500_on_a_connection_that_ends(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(make_service) as (http, service, _):

        async def fail(prompt: object) -> list[int]:
            raise RuntimeError("a bug at 0x7f00")

        with monkeypatch.context() as patched:
            patched.setattr(service, "prompt_tokens", fail)
            response = http.post(ROUTE, json=SHORT)
        assert response.headers["x-request-id"] in error_of(response, 500)["message"]
        assert "0x7f00" not in response.text and response.headers["connection"] == "close"
        assert http.post(ROUTE, json=SHORT).status_code == 200


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"prompt_logprobs": 2, "prompt": "one two"}])
def test_what_is_told_of_tokens_is_written_beside_the_event_loop(
    make_service: MakeService, fields: dict[str, Any]
) -> None:
    with served(make_service) as (http, service, _):
        texts, writing, going = service.token_text, threading.Event(), threading.Event()

        def gated(token: int) -> str:
            writing.set()
            assert going.wait(10)
            return texts(token)

        gated.stream = texts.stream  # type: ignore[attr-defined]
        service.token_text = gated  # type: ignore[assignment]
        thread, results = in_background(lambda: http.post(ROUTE, json=SHORT | fields))
        assert writing.wait(10)
        with client(str(http.base_url)) as other:
            assert other.get("/livez").status_code == 200
        going.set()
        thread.join()
        assert results[0].status_code == 200


def test_a_failure_in_a_stream_is_its_last_event(make_service: MakeService) -> None:
    with served(make_service) as (http, _, backend):
        backend.hold(after=2)
        with http.stream("POST", ROUTE, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            wait_until(lambda: backend.is_held)
            backend.failure = EngineError("gone")
            backend.go()
            events = [line for line in lines if line]
        last = json.loads(events[-1].removeprefix("data: "))
        assert last["error"].keys() == {"message", "type", "param", "code"}
        assert http.post(ROUTE, json=SHORT).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_shows_and_nothing_hangs(make_service: MakeService) -> None:
    with served(make_service) as (http, _, backend):
        assert http.get("/livez").status_code == http.get("/readyz").status_code == 200
        backend.failure = RuntimeError("a bug")
        assert error_of(http.post(ROUTE, json=SHORT), 503)["code"] == "engine_stopped"
        assert http.get("/livez").status_code == http.get("/readyz").status_code == 503
        assert error_of(http.post(ROUTE, json=SHORT), 503)["code"] == "engine_stopped"


def test_an_unexpected_failure_is_a_500_with_its_id(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(make_service) as (http, service, _):
        monkeypatch.setattr(service, "prompt_tokens", lambda prompt: 1 / 0)
        response = http.post(ROUTE, json=SHORT)
        error = error_of(response, 500)
        assert response.headers["x-request-id"] in error["message"]
        assert "division" not in response.text


def test_no_character_of_an_answer_ends_its_line(make_service: MakeService) -> None:
    with served(make_service, text="a\u2028b\x85c") as (http, _, _b):
        body = SHORT | {"stream": True, "max_tokens": 20}
        with http.stream("POST", ROUTE, json=body) as response:
            lines = [line for line in response.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "\u2028b\x85c" in "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_a_silent_stream_is_kept_alive(make_service: MakeService) -> None:
    with served(make_service, ServerSettings(keep_alive=0.05)) as (http, _, backend):
        backend.hold()
        with http.stream("POST", ROUTE, json=SHORT | {"stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines) == ": keep-alive"
            backend.go()
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_draining_server_takes_nothing_new(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(make_service) as (http, service, _):
        monkeypatch.setattr(service.worker, "_draining", True)
        response = http.post(ROUTE, json=SHORT)
        assert error_of(response, 503)["code"] == "draining"
        assert "retry-after" in response.headers
        assert http.get("/readyz").status_code == 503
        assert http.get("/livez").status_code == 200


def test_no_text_of_a_request_is_logged(
    make_service: MakeService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with served(make_service, text="an answer nobody may log ") as (http, _, backend):
        body = SHORT | {"prompt": "swordfish"}
        assert http.post(ROUTE, json=body).status_code == 200
        assert http.post(ROUTE, json=body | {"seed": "swordfish"}).status_code == 400
        backend.failure = EngineError("gone")
        assert http.post(ROUTE, json=body).status_code == 500
    assert "swordfish" not in caplog.text
    assert "nobody may log" not in caplog.text


@contextmanager
def raw_request(http: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[None]:
    """Send a request, and hang up at the end of the block without reading the answer."""
    place = urlsplit(str(http.base_url))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(head.encode() + content)
        yield
