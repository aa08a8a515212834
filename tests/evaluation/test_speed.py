"""Decode speed, on real engines and a clock that only their steps move."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Event
from lifecycle.errors import EngineError, StageError
from lifecycle.evaluation import speed
from lifecycle.evaluation.speed import ROUNDS, Speed, decode_speeds, speeds_beside
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu
from lifecycle.kinds import OnnxModel
from lifecycle.pipeline.stage import Progress
from tests import tiny
from tests.conftest import QuietProgress, as_artifact
from tests.graph.models import save_model


class Clock:
    """Stands in for `time`."""

    now = 0.0
    load = 1.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed, "time", made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speed")
    save_model("llama-tied", root)
    out = root / "onnx"
    out.mkdir()
    export_decoder(root, out, Cpu())
    return out


def paced(
    folder: Path, clock: Clock, seconds: float, length: int = 128
) -> AbstractContextManager[OnnxEngine]:
    """An engine whose steps take `seconds` on the clock."""
    engine = OnnxEngine.open(folder, EngineOptions(4, length))
    real = engine.step

    def step() -> list[Event]:
        clock.now += seconds * clock.load
        return real()

    engine.step = step  # type: ignore[method-assign]
    return closing(engine)


def test_speeds_are_those_of_the_steps(folder: Path, clock: Clock) -> None:
    with paced(folder, clock, 0.5) as slow, paced(folder, clock, 0.125) as fast:
        for batch in (1, 3):
            found = decode_speeds([slow, fast], batch, QuietProgress())
            assert [s.tokens_per_second for s in found] == [2 * batch, 8 * batch]
            assert [(s.ratio, s.error) for s in found] == [(1, 0), (4, 0)]
        assert slow.num_running == fast.num_running == 0


def test_a_busy_machine_does_not_change_the_ratio(folder: Path, clock: Clock) -> None:
    class Busy(QuietProgress):
        def update(self, done: float, total: float | None = None, **metrics: float) -> None:
            clock.load = 10 if done > ROUNDS // 3 else 1

    with paced(folder, clock, 0.5) as one, paced(folder, clock, 0.25) as two:
        found = decode_speeds([one, two], 1, Busy())
    assert found[1].ratio == 2
    assert found[1].tokens_per_second == pytest.approx(1 / 2.5)


def test_short_contexts_are_timed_in_fewer_steps(folder: Path, clock: Clock) -> None:
    with paced(folder, clock, 0.5, length=48) as short, paced(folder, clock, 0.5) as long:
        assert decode_speeds([short, long], 2, QuietProgress())[1].ratio == 1
    with (
        paced(folder, clock, 0.5, length=15) as short,
        pytest.raises(StageError, match="batch 2 in a context of 15 tokens; it takes 16"),
    ):
        decode_speeds([short], 2, QuietProgress())


def test_an_engine_that_fails_is_no_fast_one(folder: Path, clock: Clock) -> None:
    with paced(folder, clock, 0.5) as engine:

        def fail(rows: object) -> None:
            raise EngineError("out of order")

        engine._backend.forward = fail  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="failed while it was timed: out of order"):
            decode_speeds([engine], 1, QuietProgress())


@pytest.mark.parametrize(("free", "open_at_once"), [(None, [4]), (0, [2, 2, 2])])
def test_no_more_models_are_open_than_fit_into_memory(
    free: int | None, open_at_once: list[int], folder: Path, tmp_path: Path, monkeypatch
) -> None:
    tiny.write_tokenizer(folder)
    models = [as_artifact(OnnxModel, folder)]
    for name, scheme in (("a", Int8Rowwise(7)), ("b", Int8Rowwise(8)), ("c", Blockwise(16))):
        out = tmp_path / name
        out.mkdir()
        quantize_graph(folder, out, name, scheme, {})
        tiny.write_tokenizer(out)
        models.append(as_artifact(OnnxModel, out))
    counts: list[int] = []

    def counted(engines: Sequence[Engine], batch: int, progress: Progress) -> list[Speed]:
        counts.append(len(engines))
        return decode_speeds(engines, batch, progress)

    monkeypatch.setattr(speed, "available_memory", lambda: free)
    monkeypatch.setattr(speed, "decode_speeds", counted)
    found = speeds_beside(models[0], models, 2, QuietProgress())
    assert counts == open_at_once
    assert found.keys() == {model.digest for model in models}
    base = found[models[0].digest]
    assert base.ratio == 1
    for own in found.values():
        assert own.tokens_per_second == pytest.approx(base.tokens_per_second * own.ratio)
