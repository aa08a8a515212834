"""Matrices in blocks of few bits that can be trained: rounded in every step, with the gradient passed straight
through (Bengio et al. 2013, arXiv 1308.3432)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lifecycle.graph.rounding import Blocks

_MEMORY = 50
"""Steps over which it is averaged how often a weight turns back, and what it mostly is."""


class RoundedMatrix:
    """A matrix that begins as some blocks. `latent` [rows, blocks, size] and `scale` [rows, blocks] are what is trained.

    Weights that turn to and fro between two integers, each time for the worse of others that have just adapted to
    them, can be fixed at what they mostly are (Nagel et al. 2022, arXiv 2203.11086).
    """

    def __init__(self, blocks: Blocks, width: int, device: torch.device) -> None:
        self._blocks, self._width = blocks, width
        grid = blocks.grid
        assert grid.bits == 4, "what is kept of weights has 8 bits, and a sign"
        self._zero = _floats(blocks.zeros, device)[..., None]
        self._low, self._high = -self._zero, grid.levels - self._zero
        self.scale = _floats(blocks.scales, device).requires_grad_()
        integers = _floats(blocks.integers, device) - self._zero
        self.latent = (integers * self.scale.detach()[..., None]).requires_grad_()
        self._mean, self._turns = integers.clone(), torch.zeros_like(integers)
        self._last = integers.to(torch.int8)
        self._direction, self._fixed_at = torch.zeros_like(self._last), torch.zeros_like(self._last)
        self._fixed = torch.zeros_like(integers, dtype=torch.bool)

    @property
    def num_fixed(self) -> int:
        """Weights that no longer change."""
        return int(self._fixed.sum())

    def value(self) -> Tensor:
        """The matrix [rows, width] as it would be stored."""
        scale = self._stored_scale()
        steps = self.latent / scale.detach()[..., None]
        integers = self._rounded(steps)
        # Beyond the grid there is nothing to pass: a latent weight would go on for ever.
        inside = (steps >= self._low - 0.5) & (steps <= self._high + 0.5)
        passed = torch.where(inside, steps, integers)
        straight = integers + (passed - passed.detach())
        whole = straight * scale[..., None]
        return whole.reshape(len(whole), -1)[:, : self._width]

    @torch.no_grad()
    def follow(self, most_turns: float) -> None:
        """Take note of a step, and fix the weights that turn back in more than such a share of the steps."""
        integers = self._rounded(self.latent / self._stored_scale()[..., None])
        change = torch.sign(integers - self._last).to(torch.int8)
        is_back = (change != 0) & (change == -self._direction)
        self._turns.lerp_(is_back.float(), 1 / _MEMORY)
        self._mean.lerp_(integers, 1 / _MEMORY)
        self._direction = torch.where(change != 0, change, self._direction)
        self._last = integers.to(torch.int8)
        late = (self._turns > most_turns) & ~self._fixed
        self._fixed_at = torch.where(late, self._mean.round().to(torch.int8), self._fixed_at)
        self._fixed |= late

    @torch.no_grad()
    def blocks(self) -> Blocks:
        """What is stored of it."""
        scale = self._stored_scale()
        integers = self._rounded(self.latent / scale[..., None]) + self._zero
        found = integers.cpu().numpy(), scale.cpu().numpy(), self._zero.squeeze(-1).cpu().numpy()
        return Blocks.of(self._blocks.grid, len(found[0]), *found)

    def state(self) -> dict[str, Tensor]:
        """All that changes, by name, to be saved."""
        return {
            "latent": self.latent.detach(),
            "scale": self.scale.detach(),
            "last": self._last,
            "mean": self._mean,
            "direction": self._direction,
            "turns": self._turns,
            "fixed": self._fixed,
            "fixed_at": self._fixed_at,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _rounded(self, steps: Tensor) -> Tensor:
        """Integers less their zeros, without a gradient."""
        found = steps.detach().round().clamp(self._low, self._high)
        return torch.where(self._fixed, self._fixed_at.float(), found)

    def _stored_scale(self) -> Tensor:
        """Scales as they are stored, with the gradient of those that are trained."""
        now = self.scale.detach()
        stored = torch.from_numpy(self._blocks.grid.storable(now.cpu().numpy()))
        return self.scale + (stored.to(now.device) - now)


def _floats(values: np.typing.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)
