"""The training loop: AdamW over packed rows, deterministic, and resumed exactly.

Everything random is a function of seed and step. So a training that was stopped or killed at
any moment and goes on from its last snapshot ends with the same weights, bit for bit on a CPU
with the same number of threads.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lifecycle.data.packing import Packed
from lifecycle.errors import InterruptedRun, StageError
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Progress
from lifecycle.training import optimizer as adamw
from lifecycle.training.batches import Batches, batch_of, in_parts
from lifecycle.training.objective import summed_loss
from lifecycle.training.runtime import compute_dtype, pick_device
from lifecycle.training.schedule import learning_rate
from lifecycle.training.settings import LoopSettings
from lifecycle.training.snapshots import Snapshot, Snapshots

_SAVING_SHARE = 0.05
"""Most of the time that writing snapshots may take."""
_SMOOTHING = 0.1
"""Weight of the newest step in the reported loss."""
_WEIGHT, _OPTIMIZER = "weight.", "optimizer."


class Loop:
    """One training of the trainable weights of a model; `run` goes from the last snapshot, or
    the beginning, to the end."""

    def __init__(
        self,
        model: nn.Module,
        rows: Packed,
        held_out: Packed | None,
        settings: LoopSettings,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self._device = pick_device(settings.device)
        self._model, self._rows, self._held_out = model.to(self._device), rows, held_out
        self._settings, self._progress = settings, progress
        self._dtype = compute_dtype(settings.dtype, self._device)
        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = adamw.make_optimizer(self._weights.values(), settings)
        self._batches = Batches(len(rows.input_ids), settings)
        self._snapshots = Snapshots(scratch, progress.log)
        self._next_save = 0.0
        self._average: float | None = None

    def run(self) -> Metrics:
        """Train to the last step.

        Returns:
            `loss` and `perplexity` of the held-out rows if there are any, `train_loss` (both
            losses in nats per supervised token, this one a moving average), `steps`, and
            `tokens_per_second` of this attempt, padding included.

        Raises:
            InterruptedRun: the run was asked to stop; a snapshot was written before.
            StageError: the loss or the gradient is no longer finite.
        """
        first, total = self._resume(), self._batches.total
        started = time.monotonic()
        self._next_save = started + self._settings.save_seconds
        tokens, speed = 0, 0.0
        self._model.train()
        self._progress.phase("training")
        done = first
        try:
            for done in range(first + 1, total + 1):
                tokens += self._train(done - 1)
                self._save_if_due(done)
                speed = tokens / (time.monotonic() - started)
                self._report(done, tokens_per_second=speed)
            losses = self._evaluate()
        except InterruptedRun:
            self._save(done)
            raise
        return losses | {
            "train_loss": self._average,
            "steps": total,
            "tokens_per_second": round(speed),
        }

    def _train(self, step: int) -> int:
        """One optimiser step; returns how many tokens were read."""
        seed = np.random.SeedSequence([self._settings.seed, step]).generate_state(1)
        # Dropout is all that is random inside a step, so no generator state needs to be kept.
        torch.manual_seed(int(seed[0]))
        indices = self._batches.at(step)
        total, supervised = 0.0, 0
        for part in in_parts(indices, self._settings.micro_batch_size):
            loss, count = self._summed_loss(self._rows, part)
            loss.backward()
            total, supervised = total + loss.item(), supervised + count
        supervised = max(1, supervised)
        rate = learning_rate(step, self._batches.total, self._settings)
        norm = adamw.step(
            self._optimizer, self._weights.values(), supervised, rate, self._settings.max_grad_norm
        )
        self._note(step, total / supervised, norm)
        return self._rows.input_ids[indices].size

    def _summed_loss(self, rows: Packed, indices: NDArray[np.int64]) -> tuple[Tensor, int]:
        batch = batch_of(rows, indices, self._device)
        lower = self._dtype != torch.float32
        with torch.autocast(self._device.type, self._dtype, enabled=lower):
            return summed_loss(self._model, batch)

    def _note(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise StageError(
                f"the {what} is no longer finite at step {step + 1} of {self._batches.total}; "
                f"try a learning_rate below {self._settings.learning_rate:g}, a longer warmup "
                "or dtype: float32"
            )
        before = loss if self._average is None else self._average
        self._average = before + _SMOOTHING * (loss - before)

    def _report(self, done: int, **metrics: float) -> None:
        every, total = self._settings.evaluate_every, self._batches.total
        if every and done % every == 0 and done < total:
            metrics |= self._evaluate()
        rate = learning_rate(done - 1, total, self._settings)
        loss = math.nan if self._average is None else self._average
        self._progress.update(done, total, train_loss=loss, learning_rate=rate, **metrics)

    def _evaluate(self) -> dict[str, float]:
        if self._held_out is None:
            return {}
        self._progress.phase("evaluating")
        self._model.eval()
        total, supervised = 0.0, 0
        rows = self._evaluated_rows(self._held_out)
        size = self._settings.micro_batch_size or self._settings.batch_size
        with torch.no_grad():
            for number, part in enumerate(in_parts(rows, size)):
                self._progress.update(number * size, len(rows))
                loss, count = self._summed_loss(self._held_out, part)
                total, supervised = total + loss.item(), supervised + count
        self._model.train()
        self._progress.phase("training")
        mean = total / max(1, supervised)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}

    def _evaluated_rows(self, rows: Packed) -> NDArray[np.int64]:
        """Evenly spread, so that no document stands for all."""
        last = len(rows.input_ids) - 1
        return np.unique(np.linspace(0, last, self._settings.evaluate_rows).astype(np.int64))

    def _save_if_due(self, done: int) -> None:
        if time.monotonic() >= self._next_save:
            self._save(done)

    def _save(self, done: int) -> None:
        begun = time.monotonic()
        tensors = {_WEIGHT + name: weight.detach() for name, weight in self._weights.items()}
        moments = adamw.state_tensors(self._optimizer)
        tensors |= {_OPTIMIZER + name: tensor for name, tensor in moments.items()}
        self._snapshots.save(Snapshot(done, tensors, {"average": self._average}))
        taken = time.monotonic() - begun
        self._next_save = begun + taken + max(self._settings.save_seconds, taken / _SAVING_SHARE)

    def _resume(self) -> int:
        """Take the last snapshot, if there is one; returns the optimiser steps done."""
        snapshot = self._snapshots.latest()
        if snapshot is None:
            return 0
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(snapshot.tensors[_WEIGHT + name])
        moments = {n: t for n, t in snapshot.tensors.items() if n.startswith(_OPTIMIZER)}
        adamw.restore(self._optimizer, {n.removeprefix(_OPTIMIZER): t for n, t in moments.items()})
        self._average = snapshot.state["average"]
        self._progress.log(f"resumed at step {snapshot.step} of {self._batches.total}")
        return snapshot.step
