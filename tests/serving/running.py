"""A server on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import uvicorn

from serving.app import create_app
from serving.protocol import Protocol
from serving.server import bind, url
from serving.service import Service
from serving.settings import ServerSettings
from tests.serving.scripted import ScriptedBackend, ScriptedEngine

MakeService = Callable[..., Service]
"""Makes a service over a scripted engine; takes what `ScriptedEngine` does."""


@contextmanager
def running(service: Service, settings: ServerSettings | None = None) -> Iterator[str]:
    """Serve while the block runs; gives the URL."""
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(service, settings),
        http=Protocol,
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield url(listener)
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition, seconds: float = 60.0) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def order_of_ends(
    service: Service, settings: ServerSettings, asked: Sequence[tuple[str | None, dict[str, Any]]]
) -> list[int]:
    """Which of several completions of a scripted service, sent one after another while the first of
    them runs, end first: their places in `asked`, which holds the API key and the body of each."""
    engine: ScriptedEngine = service.engine  # type: ignore[attr-defined]
    engine.backend.hold()

    def ask(url: str, key: str | None, body: dict[str, Any]) -> None:
        with client(url, key) as http:
            http.post("/v1/completions", json=body).raise_for_status()

    with running(service, settings) as url, ThreadPoolExecutor(len(asked)) as pool:
        answers: list[Future[None]] = []
        for key, body in asked:
            answers.append(pool.submit(ask, url, key, body))
            wait_until(lambda: service.worker.num_unfinished == len(answers))
            wait_until(lambda: engine.backend.is_held)
        engine.backend.go()
        for answer in answers:
            answer.result()
    return [engine.came.index(id) for id in engine.ended]


def client(base_url: str, key: str | None = None) -> httpx.Client:
    """A plain HTTP client, to see what really goes over the wire."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=base_url, headers=headers, timeout=30)


@contextmanager
def served(
    make_service: MakeService, settings: ServerSettings | None = None, **options: Any
) -> Iterator[tuple[httpx.Client, Service, ScriptedBackend]]:
    service = make_service(**options)
    backend: ScriptedBackend = service.backend  # type: ignore[attr-defined]
    with running(service, settings) as url, client(url) as http:
        try:
            yield http, service, backend
        finally:
            backend.go()


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results
