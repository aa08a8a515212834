"""What many tests share: where the real data is, and a way to run one stage by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lifecycle.pipeline.artifact import Artifact, artifact_digest, hash_tree
from lifecycle.pipeline.stage import Context, Stage, references
from tests.workshop import Workshop

DATA_VARIABLE = "LIFECYCLE_TEST_DATA"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data and models; the test is skipped where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get(DATA_VARIABLE, beside))
    if not path.is_dir():
        pytest.skip(f"no test data: set {DATA_VARIABLE}")
    return path


@pytest.fixture(scope="session")
def quickstart_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests that run the reduced quickstart, so that it runs once."""
    return tmp_path_factory.mktemp("quickstart") / "store"


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """Recipes over toy stages, in a folder and on a store of their own."""
    return Workshop(tmp_path)


class QuietProgress:
    """A `Progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.updates: list[dict[str, float]] = []
        self.stopping = False

    def update(self, done: float, total: float | None = None, **metrics: float) -> None:
        self.updates.append({"done": done, **metrics})

    def phase(self, name: str) -> None:
        pass

    def log(self, message: str) -> None:
        self.lines.append(message)


RunStage = Callable[..., Artifact]


@pytest.fixture
def run_stage(tmp_path: Path) -> RunStage:
    """Run one stage outside any recipe: `run_stage(stage, base=artifact, …)` -> its artifact,
    where `base` is the name that the stage's references use. The `Context` is in `.ctx`."""

    count = 0

    def run(stage: Stage, /, **inputs: Artifact) -> Artifact:
        nonlocal count
        count += 1
        root = tmp_path / f"{count}-{type(stage).__name__}"
        out, scratch = root / "out", root / "scratch"
        out.mkdir(parents=True)
        scratch.mkdir()
        by_field = {field: inputs[ref] for field, ref in references(stage).items()}

        def build(name: str, use: str, stage: Stage, known: Mapping[str, Artifact]) -> Artifact:
            return run(stage, **known)

        ctx = Context("stage", by_field, out, scratch, QuietProgress(), inputs, build)
        metrics = stage.run(ctx)
        kept = stage.keeps_kind_of
        kind = type(by_field[kept]) if kept is not None else stage.produces
        artifact = as_artifact(kind, out, metrics)
        artifact.ctx = ctx  # type: ignore[attr-defined]
        return artifact

    return run


def as_artifact(
    kind: type[Artifact], path: Path, metrics: dict[str, Any] | None = None
) -> Artifact:
    """Any folder, seen as an artifact of a kind."""
    files = hash_tree(path)
    manifest = {
        "kind": kind.kind,
        "digest": artifact_digest(kind.kind, files),
        "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in files],
        "metrics": metrics or {},
        "made_by": {},
    }
    return kind(path, manifest)
