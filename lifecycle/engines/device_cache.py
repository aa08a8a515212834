"""Keys and values in the memory of a device, for graphs whose attention runs there."""

# onnxruntime ships no type information.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from lifecycle.engines.ort_session import HOST, present_name
from lifecycle.errors import EngineError

_DEVICES = {"Cuda": "cuda", "WebGPU_Buf": "webgpu", "DML": "dml", "Cann": "cann"}
"""What ONNX Runtime calls memory, and the device in which it gives it."""

Device = tuple[str, int]
"""Its kind, as ONNX Runtime names it, and its number."""


def cache_device(session: ort.InferenceSession, names: Sequence[str]) -> Device | None:
    """Where a graph reads and writes its cache; None for the memory of the host.

    Raises:
        EngineError: in memory that this engine cannot take.
    """
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    memories = {(info.name, info.device_id) for each, info in inputs if each.name in names}
    others = {memory for memory in memories if memory[0] != HOST}
    if not others:
        return None
    if len(memories) > 1 or not {name for name, _ in others} <= _DEVICES.keys():
        where = ", ".join(sorted(f"{name} {number}" for name, number in memories))
        raise EngineError(
            f"the graph reads its cache in {where}; this engine keeps it in the memory of the host or in that of one of "
            f"{', '.join(_DEVICES.values())}: run attention on the CPU"
        )
    ((name, number),) = others
    return _DEVICES[name], number


class DeviceCache:
    """One array per name, [slots, heads, capacity, width], that a graph reads and writes in place. All of it is taken at
    once, and it cannot be copied by ranges of tokens."""

    def __init__(
        self, device: Device, names: Sequence[str], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Take the memory, filled with zeros.

        Raises:
            EngineError: the device does not have so much.
        """
        self.num_slots = shape[0]
        self._values: dict[str, ort.OrtValue] = {}
        size = len(names) * math.prod(shape) * dtype.itemsize
        try:
            # Untouched, they take no memory here.
            zeros = np.zeros(shape, dtype)
            for name in names:
                value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, *device)
                value.update_inplace(zeros)
                self._values[name] = value
        except Exception as error:
            raise no_memory(device, size, shape, error) from error

    def num_rows(self, count: int) -> int:
        """Slots that a graph is given where it needs the first `count`: there are no views of memory on a device."""
        return self.num_slots

    def bind(self, binding: ort.IOBinding, count: int) -> None:
        """Let a graph read and write the arrays."""
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(present_name(name), value)

    def clear(self) -> None:
        """Let go of all memory, once no graph is bound to it."""
        self._values.clear()


def no_memory(
    device: Device, num_bytes: int, shape: tuple[int, ...], error: Exception
) -> EngineError:
    """What there is to say where a device has no room for arrays of this shape."""
    reason = str(error).partition("\n")[0]
    return EngineError(
        f"no memory on {device[0]} for a cache of {num_bytes >> 20} MiB ({reason}): lower max_num_seqs, {shape[0]}, "
        f"max_model_len or prefill_chunk, together {shape[2]} tokens per slot"
    )
