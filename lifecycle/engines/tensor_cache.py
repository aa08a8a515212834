"""Keys and values in the memory of a device that PyTorch reaches too: it copies what ONNX Runtime reads and writes."""

# onnxruntime ships no type information; torch types its own interface loosely.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnxruntime as ort

from lifecycle.engines.backend import Block
from lifecycle.engines.device_cache import Device, no_memory
from lifecycle.engines.ort_session import present_name
from lifecycle.errors import EngineError


def reaches(device: Device) -> bool:
    """Whether the memory of a device can be copied here: CUDA's, where PyTorch is installed and has it."""
    if device[0] != "cuda" or find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


class TensorCache:
    """One array per name, [slots, heads, capacity, width], that a graph reads and writes in place. All of it is taken at
    once, and nothing of it is given back before the end; copies are as those of `SlotCache`, blocks are in the memory of
    the host."""

    def __init__(
        self, device: Device, names: Sequence[str], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Take the memory, filled with zeros.

        Raises:
            EngineError: the device does not have so much.
        """
        import torch

        self._device, self._names, self._type = device, names, dtype.type
        self._place = torch.device(*device)
        _, heads, _, width = shape
        self.bytes_per_token = len(names) * heads * width * dtype.itemsize
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        try:
            # In one, so that a range of tokens is copied by one call.
            self._arrays = torch.zeros((len(names), *shape), dtype=kind, device=self._place)
            self._wait()
        except (RuntimeError, TypeError) as error:
            size = len(names) * math.prod(shape) * dtype.itemsize
            raise no_memory(device, size, shape, error) from error

    def num_rows(self, count: int) -> int:
        """Slots that a graph is given where it needs the first `count`."""
        return count

    def bind(self, binding: ort.IOBinding, count: int) -> None:
        """Let a graph read and write the first `count` slots of each array."""
        for name, array in zip(self._names, self._arrays[:, :count], strict=True):
            place = (*self._device, self._type, list(array.shape), array.data_ptr())
            binding.bind_input(name, *place)
            binding.bind_output(present_name(name), *place)

    def read(self, slot: int, start: int, stop: int) -> Block:
        """A copy of what a slot holds of its tokens `start` to `stop`."""
        with _failures():
            return self._arrays[:, slot, :, start:stop].clone().cpu().numpy()

    def write(self, slot: int, start: int, block: Block) -> None:
        """Put such a copy into a slot, from its token `start` on."""
        import torch

        with _failures():
            stop = start + block.shape[2]
            self._arrays[:, slot, :, start:stop] = torch.from_numpy(block).to(self._place)
            self._wait()

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Let a slot hold the tokens `start` to `stop` that another one holds."""
        with _failures():
            self._arrays[:, target, :, start:stop] = self._arrays[:, source, :, start:stop]
            self._wait()

    def forget(self, slot: int, start: int = 0) -> None:
        """Nothing: the memory stays, for the next text."""

    def forget_passed(self, slot: int, count: int, before: int = 0) -> None:
        """Nothing: what lies behind a window stays as well."""

    def clear(self) -> None:
        """Let go of all memory, once no graph is bound to it."""
        import torch

        del self._arrays
        if self._place.type == "cuda":
            # PyTorch would keep it for itself.
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        """Until PyTorch has done what it was told: ONNX Runtime has a stream of its own, which does not wait for it. The
        other way there is nothing to do, since a run ends when all is there."""
        if self._place.type == "cuda":
            import torch

            torch.cuda.current_stream(self._place).synchronize()


@contextmanager
def _failures() -> Generator[None]:
    """Inside, PyTorch's errors, among them that there is no memory, are the engine's."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"PyTorch failed to copy the cache: {error}") from error
