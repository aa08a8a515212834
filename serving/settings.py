"""How the server treats its clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of the HTTP side; those of the engine are `EngineOptions`."""

    api_keys: tuple[str, ...] = ()
    """Keys that clients may use; none lets everybody in."""
    admin_keys: tuple[str, ...] = ()
    """Keys that may do all that clients may, and load adapters too."""
    adapter_root: Path | None = None
    """The folder that adapters may be loaded from while the server runs; None lets nobody load any."""
    evict_adapters: bool = False
    """Whether a new adapter may take the place of one that nobody uses."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server from a browser (CORS)."""
    allow_priority: bool = False
    """Whether a request may put itself before others, by a `priority` below 0."""
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout: float = 30.0
    """Seconds in which the whole body of a request must have come."""
    keep_alive: float = 15.0
    """Seconds of silence after which a stream gets a comment, so that no proxy ends it."""
