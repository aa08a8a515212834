"""Rounded decoders that are trained to say what they said in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.errors import InterruptedRun, StageError
from lifecycle.evaluation.scoring import Scorer
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.rounding import Grid, least_squares, quantize
from lifecycle.graph.settled import Constants, Settled, round_matrices
from lifecycle.graph.targets import Cpu
from lifecycle.training.distill import Distilled, distill
from lifecycle.training.rounded import RoundedMatrix
from tests.conftest import QuietProgress
from tests.graph.models import VOCAB, save_model
from tests.graph.running import GraphRunner
from tests.training.conftest import StoppingProgress

CPU = torch.device("cpu")


@dataclass
class Settings:
    steps: int = 80
    batch_size: int = 4
    learning_rate: float = 5e-4
    seed: int = 0


def texts(count: int = 48) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(3, VOCAB, (count, 24)).tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distill")
    save_model("qwen2", root)
    (root / "graph").mkdir()
    export_decoder(root, root / "graph", Cpu())
    return root / "graph"


def run(
    exported: Path,
    folder: Path,
    *,
    settings: Settings | None = None,
    progress: QuietProgress | None = None,
    exceptions: Mapping[str, Scheme | None] | None = None,
    scheme: Blockwise | None = None,
) -> Distilled:
    folder.mkdir(exist_ok=True)
    (folder / "rounded").unlink(missing_ok=True)
    rounded = round_matrices(exported, folder, scheme or Blockwise(16), exceptions or {})
    return distill(
        exported,
        rounded.blocks,
        rounded.rows,
        texts(),
        settings or Settings(),
        folder,
        progress or QuietProgress(),
        device="cpu",
    )


def logits(folder: Path) -> NDArray[np.float32]:
    return np.concatenate([GraphRunner(folder).prefill(text) for text in texts()[:3]])


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_what_was_trained(
    symmetric: bool, exported: Path, tmp_path: Path
) -> None:
    """And it says more of what the float32 model says."""
    fine: dict[str, Scheme | None] = {"lm_head": Int8Rowwise(8), "*.1.mlp.down_proj": None}
    scheme = Blockwise(16, symmetric=symmetric)
    found = run(exported, tmp_path / "work", exceptions=fine, scheme=scheme)
    assert found.after < 0.5 * found.before
    made = {"plain": scheme, "trained": Settled(16, 4, symmetric, blocks=found.blocks)}
    kl: dict[str, float] = {}
    wanted = logits(exported)
    for name, way in made.items():
        (tmp_path / name).mkdir()
        changes = Constants(found.floats) if name == "trained" else None
        quantize_graph(exported, tmp_path / name, "int4", way, fine, changes=changes)
        scorer = Scorer(2)
        scorer.add(np.zeros(len(wanted), np.int64), [logits(tmp_path / name), wanted])
        kl[name] = scorer.agreement.kl
    assert kl["trained"] < 0.7 * kl["plain"]
    assert DecoderInfo.load(tmp_path / "trained").scheme == "int4"
    # Biases of products too.
    assert {name.rpartition(".")[2] for name in found.floats} == {"weight", "bias"}
    assert not any("1.mlp.down_proj" in name for name in (*found.floats, *found.blocks))


@pytest.mark.parametrize("stop", [2, 7])
def test_stopped_and_resumed_is_bit_identical(stop: int, exported: Path, tmp_path: Path) -> None:
    settings = Settings(steps=12)
    whole = run(exported, tmp_path / "whole", settings=settings)
    with pytest.raises(InterruptedRun):
        run(exported, tmp_path / "parts", settings=settings, progress=StoppingProgress(at=stop))
    progress = QuietProgress()
    resumed = run(exported, tmp_path / "parts", settings=settings, progress=progress)
    assert f"resumed at step {stop} of 12" in progress.lines
    assert resumed.after == whole.after < whole.before
    for name, blocks in whole.blocks.items():
        np.testing.assert_array_equal(blocks.integers, resumed.blocks[name].integers)
        np.testing.assert_array_equal(blocks.scales, resumed.blocks[name].scales)


def test_where_nothing_is_gained_all_stays(exported: Path, tmp_path: Path) -> None:
    progress = QuietProgress()
    settings = Settings(steps=3, learning_rate=1.0)
    found = run(exported, tmp_path / "work", settings=settings, progress=progress)
    assert found.after == found.before and not found.floats
    start = round_matrices(exported, tmp_path, Blockwise(16), {})
    for name, blocks in start.blocks.items():
        np.testing.assert_array_equal(blocks.integers, found.blocks[name].integers)


def test_what_was_trained_from_another_start_is_left_alone(exported: Path, tmp_path: Path) -> None:
    settings = Settings(steps=12)
    with pytest.raises(InterruptedRun):
        run(exported, tmp_path, settings=settings, progress=StoppingProgress(at=6))
    progress = QuietProgress()
    fine: dict[str, Scheme | None] = {"lm_head": Int8Rowwise(8)}
    run(exported, tmp_path, settings=settings, progress=progress, exceptions=fine)
    assert not any("resumed" in line for line in progress.lines)


def test_weights_that_are_no_numbers_at_the_end_are_no_gain(exported: Path, tmp_path: Path) -> None:
    settings = Settings(steps=1, learning_rate=1e30)
    found = run(exported, tmp_path / "work", settings=settings)
    assert found.after == found.before and not found.floats


def test_one_text_is_too_few(exported: Path, tmp_path: Path) -> None:
    blocks = round_matrices(exported, tmp_path, Blockwise(16), {}).blocks
    with pytest.raises(StageError, match="1 texts are too few"):
        distill(exported, blocks, [], texts(1), Settings(), tmp_path, QuietProgress())


def test_a_divergence_without_end_is_an_error(exported: Path, tmp_path: Path) -> None:
    settings = Settings(steps=9, learning_rate=1e30)
    with pytest.raises(StageError, match="no longer finite at step .* learning_rate below 1e\\+30"):
        run(exported, tmp_path / "work", settings=settings)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_matrix_begins_as_its_blocks(symmetric: bool, fits: bool) -> None:
    weights = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    grid = Grid(16, symmetric=symmetric)
    grid = grid.fitting([grid.largest(weights)]) if fits else grid
    blocks = quantize(weights, grid, least_squares)
    matrix = RoundedMatrix(blocks, 40, CPU)
    np.testing.assert_array_equal(matrix.value().detach().numpy(), blocks.floats(40))
    again = matrix.blocks()
    np.testing.assert_array_equal(again.integers, blocks.integers)
    np.testing.assert_array_equal(again.scales, blocks.scales)
    np.testing.assert_array_equal(again.zeros, blocks.zeros)


def test_the_gradient_passes_the_rounding_but_not_the_edge() -> None:
    weights = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)
    matrix = RoundedMatrix(quantize(weights, Grid(16), least_squares), 16, CPU)
    with torch.no_grad():
        matrix.latent[0, 0, 0] = 100.0
    matrix.value().sum().backward()  # pyright: ignore[reportUnknownMemberType]
    gradient = matrix.latent.grad
    assert gradient is not None and gradient[0, 0, 0] == 0
    np.testing.assert_allclose(gradient.numpy().ravel()[1:], 1, rtol=1e-6)


def test_what_turns_to_and_fro_is_fixed_at_what_it_mostly_is() -> None:
    blocks = quantize(np.ones((1, 16), np.float32), Grid(16), least_squares)
    matrix = RoundedMatrix(blocks, 16, CPU)
    scale = matrix.scale.detach()[0, 0]
    home = matrix.latent.detach()[0, 0, 0].clone()
    for step in range(60):
        with torch.no_grad():
            # Away in one step of three.
            matrix.latent[0, 0, 0] = home + scale * (step % 3 == 0)
        matrix.follow(0.1)
    assert matrix.num_fixed == 1
    with torch.no_grad():
        matrix.latent[0, 0, 0] = home + 3 * scale
        matrix.latent[0, 0, 1] = home + 3 * scale
    value = matrix.value().detach()[0]
    assert value[0] == value[2] != value[1]
