"""Hardware that a graph is made for, and what it can run."""

from __future__ import annotations

from typing import ClassVar

from lifecycle.pipeline.registry import TARGETS, Plugin


class Target(Plugin):
    """What the export must know of the hardware. A plug-in overrides what differs."""

    group: ClassVar[str] = TARGETS

    providers: ClassVar[tuple[str, ...]] = ("CPUExecutionProvider",)
    """ONNX Runtime's execution providers, the preferred one first."""
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    """Types of the cache of keys and values that its attention runs: `float32`, which exports have,
    `int8`, `int4`."""
    schemes: ClassVar[tuple[str, ...]] = ()
    """The quantisations that run well there."""

    def fuses_rotary(self, head_size: int) -> bool:
        """Whether the attention operator rotates heads of this size itself; nodes before it do
        so otherwise."""
        return False


class Cpu(Target):
    """ONNX Runtime's CPU execution provider."""

    use: str = "cpu"
    schemes: ClassVar[tuple[str, ...]] = (
        *("int8-rowwise", "int8", "int4", "int8-static"),
        *("fp16", "bf16"),
    )
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float32", "int8", "int4")

    def fuses_rotary(self, head_size: int) -> bool:
        """Its attention refuses other sizes."""
        return head_size % 16 == 0
