"""What clients may hold of a server, and for how long: bodies, heads, answers, texts to tokenise."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from serving.protocol import Protocol
from serving.settings import ServerSettings
from tests.serving.running import MakeService, in_background, served, wait_until
from tests.serving.test_errors import error_of
from tests.serving.test_metrics import scrape, value

ROUTE = "/v1/completions"
LONG = {"model": "scripted", "prompt": "x", "max_tokens": 400}
SHORT = LONG | {"max_tokens": 4}


def test_a_body_has_a_longest_length(make_service: MakeService) -> None:
    with served(make_service, ServerSettings(max_body_bytes=1000)) as (http, _, _b):
        response = http.post(ROUTE, json=SHORT | {"prompt": "x" * 1000})
        assert error_of(response, 413)["code"] == "request_too_large"

        def chunks() -> Iterator[bytes]:
            for _ in range(50):
                yield b" " * 100

        headers = {"Content-Type": "application/json"}
        error_of(http.post(ROUTE, content=chunks(), headers=headers), 413)
        assert http.post(ROUTE, json=SHORT).status_code == 200


def test_a_slow_body_times_out(make_service: MakeService) -> None:
    with served(make_service, ServerSettings(body_timeout=0.1)) as (http, _, _b):
        place = urlsplit(str(http.base_url))
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        # Without a body, which might be slow too.
        assert http.get("/health").status_code == 200


def test_large_bodies_are_held_up_to_a_bound_together(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends large bodies and does not end them is refused at the bound; small ones are always read."""
    monkeypatch.setattr("serving.middleware.MOST_HELD", 100_000)
    settings = ServerSettings(max_body_bytes=200_000)
    with served(make_service, settings) as (http, _, _b), ExitStack() as stack:
        place = urlsplit(str(http.base_url))

        def begin() -> socket.socket:
            address = (place.hostname, place.port)
            connection = stack.enter_context(socket.create_connection(address, timeout=10))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 190000\r\n\r\n" + b" " * 180_000
            )
            return connection

        def finish(connection: socket.socket) -> None:
            connection.sendall(b" " * 10_000)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")

        # Each holds 114,464 bytes beyond the small part: two of them are more than one body may have.
        waiting = {begin() for _ in range(3)}
        while len(waiting) > 1:
            for connection in select.select(waiting, [], [], 10)[0]:
                answer = connection.recv(1000)
                assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer.lower()
                waiting.remove(connection)
        assert http.post(ROUTE, json=SHORT).status_code == 200
        finish(waiting.pop())
        finish(begin())
        rejected = value(scrape(http), "admission_rejections_total", reason="bodies_full")
        assert rejected == 2


def test_half_a_head_does_not_hold_a_connection(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.protocol.HEAD_TIMEOUT", 0.5)
    with served(make_service) as (http, _, _):
        address = (http.base_url.host, http.base_url.port or 80)
        head = b"GET /health HTTP/1.1\r\nHost: x\r\n"
        for sent in (b"", head, head + b"\r\n" + head):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(sent)
                received = b""
                while part := connection.recv(4096):
                    received += part
                assert received.count(b"200 OK") == sent.count(b"\r\n\r\n")
        monkeypatch.undo()
        assert http.get("/health").status_code == 200


def connections(monkeypatch: pytest.MonkeyPatch) -> list[Protocol]:
    """Those that a server takes from now on; each has a deadline at first, and little room to send."""
    made: list[Protocol] = []
    begin = Protocol.connection_made

    def connection_made(self: Protocol, transport: asyncio.Transport) -> None:
        begin(self, transport)
        assert self._deadline is not None
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        made.append(self)

    monkeypatch.setattr(Protocol, "connection_made", connection_made)
    return made


def test_a_head_in_time_lets_the_answer_take_its_own(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = connections(monkeypatch)
    with served(make_service) as (http, service, backend):
        backend.hold()
        thread, results = in_background(lambda: http.post(ROUTE, json=SHORT))
        wait_until(lambda: service.worker.num_unfinished == 1)
        assert [protocol._deadline for protocol in made] == [None]
        backend.go()
        thread.join()
        assert results[0].status_code == 200


def test_who_does_not_read_is_not_waited_for(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is asked than the system's buffers have room for; who reads some of it may go on."""
    made = connections(monkeypatch)
    with served(make_service) as (http, _, _):
        size = len(http.get("/openapi.json").content)
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * (4_000_000 // size)
        with socket.socket() as reader:
            reader.settimeout(10)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            reader.connect((http.base_url.host, http.base_url.port or 80))
            reader.sendall(asked)
            wait_until(lambda: len(made) == 2)
            protocol = made[1]

            def is_closed() -> bool:
                """After what is done when the time is over."""
                wait_until(lambda: protocol.flow.write_paused)
                assert protocol._reader is not None
                protocol._reader.cancel()
                checked = threading.Event()
                protocol.loop.call_soon_threadsafe(protocol._check_reader)
                protocol.loop.call_soon_threadsafe(checked.set)
                assert checked.wait(10)
                return protocol.transport.is_closing()

            wait_until(lambda: protocol.flow.write_paused)
            while not protocol._has_read:
                reader.recv(1 << 16)
            assert not is_closed()
            # The system may still be taking some.
            wait_until(is_closed)
        assert http.get("/health").status_code == 200


def test_long_texts_are_tokenised_one_at_a_time_and_only_so_many_wait(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.service.MAX_LONG_TEXTS", 2)
    with served(make_service) as (http, service, _):
        encode, going, most = service.tokenizer.encode, threading.Event(), [0, 0]

        def slow(text: str, **options: bool) -> list[int]:
            if len(text) > 100:
                most[0] += 1
                most[1] = max(most)
                going.wait(10)
                most[0] -= 1
            return encode(text, **options)

        monkeypatch.setattr(service.tokenizer, "encode", slow)
        long = SHORT | {"prompt": "x" * 100_000}
        waiting = [in_background(lambda: http.post(ROUTE, json=long)) for _ in range(2)]
        wait_until(lambda: service._long_waiting == 2)
        assert error_of(http.post(ROUTE, json=long), 503)["code"] == "queue_full"
        assert http.post(ROUTE, json=SHORT).status_code == 200
        going.set()
        for thread, results in waiting:
            thread.join()
            assert error_of(results[0], 400)["code"] == "context_length_exceeded"
        assert most[1] == 1


def test_as_many_texts_are_tokenised_as_there_are_places(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(make_service, slots=1, max_queue=1) as (http, service, _):
        encode, going, begun = service.tokenizer.encode, threading.Event(), list[str]()

        def slow(text: str, **options: bool) -> list[int]:
            begun.append(text)
            going.wait(10)
            return encode(text, **options)

        monkeypatch.setattr(service.tokenizer, "encode", slow)
        waiting = [in_background(lambda: http.post(ROUTE, json=SHORT)) for _ in range(2)]
        wait_until(lambda: len(begun) == 2)
        assert error_of(http.post(ROUTE, json=SHORT), 503)["code"] == "queue_full"
        going.set()
        for thread, results in waiting:
            thread.join()
            assert results[0].status_code == 200
        assert http.post(ROUTE, json=SHORT).status_code == 200
