"""HTTP/1.1 on a connection, with deadlines for those who send the head of a request and for those who read."""

# uvicorn and asyncio type their protocols loosely.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT = 20.0
"""Seconds in which the head of a request must have come. uvicorn waits for ever, so that a client
that sends half a head on each of a thousand connections takes all that a process may open."""


READ_TIMEOUT = 60.0
"""Seconds in which a client must have taken something of what waits for it. uvicorn and asyncio keep a
response of megabytes, and its connection, for one that never reads."""


class Protocol(H11Protocol):
    """uvicorn's protocol; a connection whose request does not begin in time is closed, and so is one whose
    client does not read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        """When it is looked whether the client has read."""
        self._unread, self._has_read = 0, False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._reader is not None:
            self._reader.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._has_read = True
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._has_request():
            self._stop_waiting()
        elif self._deadline is None:
            self._wait()

    def _has_request(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(HEAD_TIMEOUT, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self._has_request():
            self.transport.close()

    def _watch_reader(self) -> None:
        """If something waits to be read, look again later."""
        if self._reader is None and (unread := self.transport.get_write_buffer_size()):
            self._unread, self._has_read = unread, False
            self._reader = self.loop.call_later(READ_TIMEOUT, self._check_reader)

    def _check_reader(self) -> None:
        self._reader = None
        if self._has_read or self.transport.get_write_buffer_size() < self._unread:
            self._watch_reader()
        else:
            self.transport.abort()
