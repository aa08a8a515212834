"""A service on a socket: starts, says so, and drains when told to stop."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn

from lifecycle.errors import LifecycleError
from serving.app import create_app
from serving.protocol import Protocol
from serving.service import Service
from serving.settings import ServerSettings

KEEP_ALIVE = 65
"""Seconds for which an idle connection stays open: longer than clients and proxies reuse one,
so that they never send into a connection that is just being closed."""
GRACE = 5
"""Seconds beyond the shutdown timeout in which responses can say that they were ended."""


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address; nobody can connect until `run` listens on it. Port 0 takes a free one.

    Raises:
        LifecycleError: the address is in use or cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small packets at once only on sockets that are TCP by name. Otherwise each
    # response on a connection in use waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "another program uses that port" if in_use else str(error)
        raise LifecycleError(
            f"cannot listen on {host}:{port}: {reason}; choose another --host or --port"
        ) from None
    return listener


def url(listener: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    service: Service,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    shutdown_timeout: float,
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is running.

    Args:
        listener: a socket from `bind`.
        shutdown_timeout: seconds for what is running; what is not done by then ends with an
            error.
        on_ready: called once requests are taken.
    """
    config = uvicorn.Config(
        create_app(service, settings),
        http=Protocol,
        ws="none",
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(shutdown_timeout) + GRACE,
    )
    _Server(config, service, shutdown_timeout, on_ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        shutdown_timeout: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._service = service
        self._shutdown_timeout = shutdown_timeout
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn would raise the signal again at the end; a drained server has succeeded."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._drain, loop)
        yield

    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            # A second signal ends the process at once.
            signal.signal(number, signal.SIG_DFL)
        self._service.worker.drain(self._shutdown_timeout)
        self.should_exit = True
