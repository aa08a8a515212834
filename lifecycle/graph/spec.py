"""What the graph builder must know of a decoder, whatever its architecture is called."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Rotary scaling of Llama 3.1: long wavelengths are stretched, short ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scaled frequencies, in radians per token."""
        wavelengths = 2 * np.pi / frequencies
        turns = self.original_max_position_embeddings / wavelengths
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (kept * frequencies + (1 - kept) * frequencies / self.factor).astype(np.float32)


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Rotary scaling that stretches every wavelength by one factor."""

    factor: float

    def __call__(self, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scaled frequencies, in radians per token."""
        return frequencies / np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding over the whole head, halves rotated (not interleaved)."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def frequencies(self, head_size: int) -> NDArray[np.float32]:
        """Radians per token, [head_size / 2]."""
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        frequencies = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        return frequencies if self.scaling is None else self.scaling(frequencies)

    def tables(
        self, positions: int, head_size: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines, each float32 [positions, head_size / 2]."""
        angles = np.outer(np.arange(positions, dtype=np.float32), self.frequencies(head_size))
        return np.cos(angles), np.sin(angles)


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of pre-normalised blocks: RMS norm, rotary grouped-query attention, gated MLP."""

    architecture: str
    """`model_type` of the checkpoint."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    activation: str = "silu"
    """`silu`, `gelu`, `gelu_pytorch_tanh` or `relu`, on the gate of the MLP."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normalised per head before the rotation."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; None is all."""

    @property
    def q_size(self) -> int:
        """Width of the queries of a token."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of the keys, or of the values, of a token."""
        return self.num_kv_heads * self.head_size
