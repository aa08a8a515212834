"""Where and in which type a model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lifecycle.errors import StageError

_CPU_INFO = Path("/proc/cpuinfo")
_FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", " bf16")
"""How Linux names the instructions, the last one on Arm. Without them bfloat16 is several
times slower than float32."""


def pick_device(name: str) -> torch.device:
    """The device that the setting `device` means.

    Raises:
        StageError: there is no such device on this host.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"device: '{name}' cannot be used here: {reason}; try 'auto'") from error


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that the setting `dtype` means on a device."""
    if name == "auto":
        fast = _cpu_has_bfloat16() if device.type == "cpu" else _accelerator_has_bfloat16(device)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _cpu_has_bfloat16() -> bool:
    if not _CPU_INFO.is_file():
        return False
    return any(flag in _CPU_INFO.read_text(encoding="utf-8") for flag in _FAST_BFLOAT16)


def _accelerator_has_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def isolated(threads: int | None) -> Iterator[None]:
    """Inside, PyTorch's operators have that many threads, None leaving them as they are;
    outside, threads and random numbers are as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
