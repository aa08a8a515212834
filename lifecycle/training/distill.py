"""Training of a rounded decoder to say what the decoder in float32 says: all that is stored is trained against the
divergence of its predictions, with the matrices rounded as they will be."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lifecycle.errors import InterruptedRun, StageError
from lifecycle.graph.channels import NORMS
from lifecycle.graph.rounding import Blocks
from lifecycle.pipeline.stage import Progress
from lifecycle.training.rounded import RoundedMatrix
from lifecycle.training.runtime import isolated, pick_device
from lifecycle.training.snapshots import Snapshot, Snapshots
from lifecycle.training.torch_graph import TorchGraph

Texts = Sequence[Sequence[int]]

_BETAS = (0.9, 0.99)
_WARMUP = 50
"""Steps, or a twentieth of all."""
_TURNS = (0.12, 0.06)
"""A weight that turns back in more than such a share of the steps is fixed: at the beginning, and at the end."""
_HELD_OUT = 16
"""Texts that tell whether anything was gained, or a sixteenth of all."""
_LOGITS = 1 << 25
"""Logits that are computed at once: some three times 128 MB of them."""
_SAVE_SECONDS = 20.0
"""Between two snapshots."""
_SAVING_SHARE = 0.05
"""Most of the time that writing snapshots may take."""


class Settings(Protocol):
    """How long and how fast; see `lifecycle.stages.quantize.Distill`."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Distilled:
    """What the training came to."""

    blocks: Mapping[str, Blocks]
    """The matrices in blocks, by the names of the constants that they are stored for."""
    floats: Mapping[str, NDArray[np.float32]]
    """Other constants that have changed."""
    before: float
    after: float
    """Divergence of the predictions on texts held out, in nats per token, with activations, the cache and what is not in
    blocks in float32."""


def distill(
    folder: Path,
    blocks: Mapping[str, Blocks],
    floats: Sequence[str],
    texts: Texts,
    settings: Settings,
    scratch: Path,
    progress: Progress,
    *,
    device: str = "auto",
) -> Distilled:
    """Train the float32 decoder in `folder` with some constants as `blocks`, and the matrices `floats`, norms and
    biases as they are. Goes on from the last snapshot in `scratch`; where nothing was gained, all stays as it was.

    Raises:
        InterruptedRun: the run was asked to stop; a snapshot was written before.
        StageError: the graph cannot be trained, there is nothing to train or too few texts to train it on, or the
            divergence is not finite.
    """
    if not blocks:
        raise StageError("distill: no matrix is stored in 4 bits, so there is nothing to train")
    if len(texts) < 2:
        raise StageError(f"distill: {len(texts)} texts are too few: one is held out")
    # Rounded anew in each run; what was trained from another start is none of this one.
    kept = scratch / "distillation"
    ours = kept / _digest(blocks, floats)
    for other in kept.glob("*"):
        if other != ours:
            progress.log("rounded otherwise than before: training begins anew")
            shutil.rmtree(other)
    ours.mkdir(parents=True, exist_ok=True)
    with isolated(None):
        graph = TorchGraph(folder, pick_device(device))
        return _Distillation(graph, blocks, floats, texts, settings, ours, progress).run()


class _Distillation:
    def __init__(
        self,
        graph: TorchGraph,
        blocks: Mapping[str, Blocks],
        floats: Sequence[str],
        texts: Texts,
        settings: Settings,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self._graph, self._settings, self._progress = graph, settings, progress
        constants = graph.constants
        self._start = dict(blocks)
        self._matrices = {
            name: RoundedMatrix(found, constants[name].shape[1], constants[name].device)
            for name, found in blocks.items()
        }
        trained = [*floats, *_vectors(graph)]
        self._floats = {name: constants[name].clone().requires_grad_() for name in trained}
        held_out = max(1, min(_HELD_OUT, len(texts) // 16))
        # The first ones may have calibrated what is trained.
        self._held_out, self._texts = texts[-held_out:], texts[:-held_out]
        matrices = self._matrices.values()
        latent = [_Adam(matrix.latent, is_whole=True) for matrix in matrices]
        others = [*(matrix.scale for matrix in matrices), *self._floats.values()]
        self._optimizer = latent + [_Adam(weight) for weight in others]
        self._snapshots = Snapshots(scratch, progress.log)
        self._average: float | None = None

    def run(self) -> Distilled:
        progress, total = self._progress, self._settings.steps
        progress.phase("distillation")
        before = self._divergence()
        if not math.isfinite(before):
            raise StageError(
                "distill: the predictions of the model, float32 or rounded, are not finite"
            )
        done = first = self._resume()
        next_save = time.monotonic() + _SAVE_SECONDS
        try:
            for done in range(first + 1, total + 1):
                self._step(done - 1)
                if time.monotonic() >= next_save:
                    next_save = self._save(done)
                progress.update(done, total, kl=self._average or 0.0)
        except InterruptedRun:
            self._save(done)
            raise
        if first < total:
            # What comes behind is done anew after a stop, this is not.
            self._save(total)
        after = self._divergence()
        if not after < before:  # Neither where it is no number.
            progress.log(
                f"distillation gained nothing: {before:.4g} nats before, {after:.4g} after"
            )
            return Distilled(self._start, {}, before, before)
        return Distilled(
            {name: matrix.blocks() for name, matrix in self._matrices.items()},
            {name: weight.detach().cpu().numpy() for name, weight in self._floats.items()},
            before,
            after,
        )

    def _step(self, step: int) -> None:
        part = step / self._settings.steps
        warmup = min(_WARMUP, max(1, self._settings.steps // 20))
        falling = 0.5 * (1 + math.cos(math.pi * part))
        rate = self._settings.learning_rate * min(1.0, (step + 1) / warmup) * falling
        batch = self._batch(step)
        count, total = sum(map(len, batch)), 0.0
        for texts in self._parts(batch):
            loss = self._summed(texts) / count
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            total += loss.item()
        if not math.isfinite(total):
            raise StageError(
                f"the divergence is no longer finite at step {step + 1} of {self._settings.steps}; "
                f"try a learning_rate below {self._settings.learning_rate:g}"
            )
        for adam in self._optimizer:
            adam.step(rate)
        for matrix in self._matrices.values():
            matrix.follow(_TURNS[1] + (_TURNS[0] - _TURNS[1]) * falling)
        before = total if self._average is None else self._average
        self._average = before + 0.1 * (total - before)

    def _batch(self, step: int) -> Texts:
        """Each text once before any comes again."""
        count, size = len(self._texts), self._settings.batch_size
        places = range(step * size, (step + 1) * size)
        orders = {
            turn: np.random.default_rng([self._settings.seed, turn]).permutation(count)
            for turn in {place // count for place in places}
        }
        return [self._texts[orders[place // count][place % count]] for place in places]

    def _parts(self, texts: Texts) -> Iterator[Texts]:
        """As many at a time as there is memory for."""
        size = max(1, _LOGITS // (self._graph.vocab_size * max(map(len, texts))))
        for start in range(0, len(texts), size):
            yield texts[start : start + size]

    def _summed(self, texts: Texts) -> Tensor:
        """The divergence from float32, summed over the tokens."""
        with torch.no_grad():
            wanted = F.log_softmax(self._graph.logits(texts), -1)
        changed = {name: matrix.value() for name, matrix in self._matrices.items()}
        found = F.log_softmax(self._graph.logits(texts, self._floats | changed), -1)
        return F.kl_div(found, wanted, reduction="sum", log_target=True)

    def _divergence(self) -> float:
        with torch.no_grad():
            total = sum(self._summed(texts).item() for texts in self._parts(self._held_out))
        return total / sum(map(len, self._held_out))

    def _state(self) -> dict[str, Tensor]:
        found = {f"float.{name}": weight.detach() for name, weight in self._floats.items()}
        for name, matrix in self._matrices.items():
            found |= {f"matrix.{name}.{key}": value for key, value in matrix.state().items()}
        for i, adam in enumerate(self._optimizer):
            found |= {f"adam.{i}.{key}": value for key, value in adam.state().items()}
        return found

    def _save(self, done: int) -> float:
        """Write a snapshot; when the next one is due."""
        begun = time.monotonic()
        state = {name: tensor.contiguous() for name, tensor in self._state().items()}
        self._snapshots.save(Snapshot(done, state, {"average": self._average}))
        taken = time.monotonic() - begun
        return begun + taken + max(_SAVE_SECONDS, taken / _SAVING_SHARE)

    def _resume(self) -> int:
        snapshot = self._snapshots.latest()
        if snapshot is None:
            return 0
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(snapshot.tensors[name])
        for adam in self._optimizer:
            adam.steps = snapshot.step
        self._average = snapshot.state["average"]
        self._progress.log(f"resumed at step {snapshot.step} of {self._settings.steps}")
        return snapshot.step


class _Adam:
    """Adam (Kingma and Ba 2014) for one tensor. With `is_whole` all of it shares a second moment, as in Adam-mini
    (Zhang et al. 2024, arXiv 2406.16793): else weights whose gradient is mere noise walk as far as all others, each
    time over the edge of an integer."""

    def __init__(self, weight: Tensor, *, is_whole: bool = False) -> None:
        self._weight, self._is_whole = weight, is_whole
        self._first = torch.zeros_like(weight)
        shape = () if is_whole else weight.shape
        self._second = torch.zeros(shape, device=weight.device)
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Go along the gradient, and clear it."""
        gradient = self._weight.grad
        if gradient is None:
            return
        self.steps += 1
        squares = gradient.square()
        self._first.lerp_(gradient, 1 - _BETAS[0])
        self._second.lerp_(squares.mean() if self._is_whole else squares, 1 - _BETAS[1])
        first, second = (1 - beta**self.steps for beta in _BETAS)
        size = (self._second / second).sqrt() + 1e-12
        self._weight -= rate / first * self._first / size
        self._weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """What changes, by name."""
        return {"first": self._first, "second": self._second}


def _digest(blocks: Mapping[str, Blocks], floats: Sequence[str]) -> str:
    """Tells one start from another."""
    found = hashlib.sha256(repr((sorted(blocks), sorted(floats))).encode())
    for name in sorted(blocks):
        one = blocks[name]
        found.update(repr(one.grid).encode())
        for part in (one.integers, one.scales, one.zeros):
            found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()[:16]


def _vectors(graph: TorchGraph) -> list[str]:
    """Weights and biases of norms, and biases of products, that one node alone reads."""
    inputs = {**NORMS, "Gemm": slice(2, 3)}
    count = Counter(name for node in graph.nodes for name in node.input)
    return [
        name
        for node in graph.nodes
        if node.op_type in inputs
        for name in node.input[inputs[node.op_type]]
        if name in graph.constants and count[name] == 1
    ]
