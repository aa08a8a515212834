from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from safetensors.torch import load_file

from lifecycle.errors import InterruptedRun, StageError
from lifecycle.training.loop import Loop
from lifecycle.training.settings import LoopSettings
from tests.conftest import QuietProgress
from tests.training.conftest import StoppingProgress, assert_same, tiny_model, toy_rows, train

ALWAYS = {"save_seconds": 0.0}


def test_the_loss_falls_and_the_metrics_say_so(tmp_path: Path) -> None:
    settings = LoopSettings(
        epochs=20, batch_size=4, context_length=32, learning_rate=1e-2, evaluate_every=20
    )
    progress = QuietProgress()
    rows = toy_rows()
    metrics = Loop(tiny_model(), rows, rows, settings, tmp_path, progress).run()
    losses = [update["train_loss"] for update in progress.updates if "train_loss" in update]
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["steps"] == len(losses)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["loss"] < losses[0]
    assert {"learning_rate", "tokens_per_second"} <= progress.updates[0].keys()
    evaluated = [update["done"] for update in progress.updates if "loss" in update]
    assert evaluated == list(range(20, len(losses), 20))


def test_the_same_settings_give_the_same_weights(tmp_path: Path, settings: LoopSettings) -> None:
    assert_same(train(tmp_path / "a", settings), train(tmp_path / "b", settings))


def test_another_seed_gives_other_weights(tmp_path: Path, settings: LoopSettings) -> None:
    other = settings.model_copy(update={"seed": 1})
    first, second = train(tmp_path / "a", settings), train(tmp_path / "b", other)
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


@limits(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_stopped_and_resumed_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, settings: LoopSettings, stops: list[int]
) -> None:
    root = tmp_path_factory.mktemp("resume")
    undisturbed = train(root / "whole", settings)
    for stop in sorted(stops):
        with pytest.raises(InterruptedRun):
            train(root / "parts", settings, StoppingProgress(at=stop))
            raise InterruptedRun("there was nothing left to stop")
    assert_same(train(root / "parts", settings), undisturbed)


class StoppedInEvaluation(QuietProgress):
    """Asks to stop while a loss on the test split is taken."""

    evaluating = False

    def phase(self, name: str) -> None:
        self.evaluating = name == "evaluating"

    def update(self, done: float, total: float | None = None, **metrics: float) -> None:
        if self.evaluating and done:
            raise InterruptedRun("stopped")


@pytest.mark.parametrize(("every", "step"), [(5, 5), (None, 12)])
def test_a_stop_in_an_evaluation_loses_no_step(
    tmp_path: Path, settings: LoopSettings, every: int | None, step: int
) -> None:
    settings = settings.model_copy(update={"evaluate_every": every})
    undisturbed = train(tmp_path / "whole", settings)
    rows, model = toy_rows(), tiny_model()
    scratch = tmp_path / "parts"
    scratch.mkdir()
    with pytest.raises(InterruptedRun):
        Loop(model, rows, rows, settings, scratch, StoppedInEvaluation()).run()
    (path,) = scratch.iterdir()
    assert path.name.startswith(f"{step:08d}-")
    assert_same(train(scratch, settings), undisturbed)


def test_micro_batches_change_rounding_only(tmp_path: Path, settings: LoopSettings) -> None:
    without_dropout = {"attention_dropout": 0.0}
    whole = train(tmp_path / "a", settings, model=tiny_model(**without_dropout))
    small = settings.model_copy(update={"micro_batch_size": 1})
    parts = train(tmp_path / "b", small, model=tiny_model(**without_dropout))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=2e-4, rtol=1e-3)


def test_a_damaged_snapshot_starts_over(tmp_path: Path, settings: LoopSettings) -> None:
    undisturbed = train(tmp_path / "whole", settings)
    with pytest.raises(InterruptedRun):
        train(tmp_path / "parts", settings, StoppingProgress(at=5))
    (path,) = (tmp_path / "parts").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    progress = QuietProgress()
    assert_same(train(tmp_path / "parts", settings, progress), undisturbed)
    assert "damaged" in progress.lines[0]


def test_a_loss_that_is_not_finite_stops_with_advice(
    tmp_path: Path, settings: LoopSettings
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(math.inf)
    with pytest.raises(StageError, match=r"step 1 of 12.*learning_rate below 0.001"):
        train(tmp_path, settings, model=model)


def test_bfloat16_computes_but_keeps_float32_weights(
    tmp_path: Path, settings: LoopSettings
) -> None:
    lower = settings.model_copy(update={"dtype": "bfloat16", "steps": 3})
    weights = train(tmp_path, lower)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    exact = train(tmp_path / "exact", settings.model_copy(update={"steps": 3}))
    assert not torch.equal(weights["lm_head.weight"], exact["lm_head.weight"])


_KILLED = """
import sys
from pathlib import Path
from lifecycle.training.settings import LoopSettings
from safetensors.torch import save_file
from tests.conftest import QuietProgress
from tests.training.conftest import train

class Loud(QuietProgress):
    def update(self, done, total=None, **metrics):
        print(int(done), flush=True)

settings = LoopSettings.model_validate_json(sys.argv[1])
save_file(train(Path(sys.argv[2]), settings, Loud()), sys.argv[3])
"""


def _run(settings: LoopSettings, scratch: Path, out: Path, kill_at: int | None = None) -> None:
    command = [sys.executable, "-c", _KILLED, settings.model_dump_json(), str(scratch), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if kill_at is not None and int(line) >= kill_at:
                process.kill()
                break
    assert process.wait() == (0 if kill_at is None else -signal.SIGKILL)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, settings: LoopSettings) -> None:
    often = settings.model_copy(update=ALWAYS)
    out = tmp_path / "weights.safetensors"
    _run(often, tmp_path / "killed", out, kill_at=7)
    assert not out.exists()
    _run(often, tmp_path / "killed", out)
    assert_same(load_file(out), train(tmp_path / "whole", settings))
