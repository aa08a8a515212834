"""A server on a real socket, in a thread of the test's own process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx
import uvicorn

from serving.app import create_app
from serving.protocol import Protocol
from serving.server import bind, url
from serving.service import Service
from serving.settings import ServerSettings


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


def wait_until(condition, seconds: float = 10.0) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def client(base_url: str, key: str | None = None) -> httpx.Client:
    """A plain HTTP client, to see what really goes over the wire."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=base_url, headers=headers, timeout=30)
