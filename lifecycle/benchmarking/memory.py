"""Resident memory of this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

_PROC = Path("/proc/self")


def resident() -> int | None:
    """Bytes now; None where the system does not say."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes since `reset_peak`, or since the process began where that cannot be reset."""
    found = _status("VmHWM")
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> bool:
    """Let the peak begin anew; False where the system cannot."""
    try:
        # See proc_pid_clear_refs(5).
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    try:
        text = (_PROC / "status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None
