"""This project's own kernels for ONNX Runtime on a CPU."""

from __future__ import annotations

from typing import Literal, get_args

Kernels = Literal["auto", "native", "onnxruntime"]
"""Whose kernels compute a graph on the CPU."""
KERNELS: tuple[Kernels, ...] = get_args(Kernels)
