"""The memory that the C library keeps of what was freed."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def trim_heap() -> None:
    """Give memory that was freed back to the system; glibc keeps it for later, up to all that was ever in use."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
