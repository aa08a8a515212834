from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lifecycle.errors import CheckpointError
from lifecycle.stages.checkpoint import Checkpoint
from lifecycle.training import hub
from tests.conftest import QuietProgress, RunStage
from tests.tiny import write_tokenizer
from tests.training.conftest import tiny_model

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_model().save_pretrained(path)
    write_tokenizer(path)
    return path


def test_a_local_folder(run_stage: RunStage, folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit")
    model = run_stage(Checkpoint(path=folder))
    assert {file.path for file in model.files} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert model.metrics["model_type"] == "llama"
    progress: QuietProgress = model.ctx.progress  # type: ignore[attr-defined]
    assert any("modeling.py" in line for line in progress.lines)


def test_symbolic_links_become_files(run_stage: RunStage, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    model = run_stage(Checkpoint(path=folder))
    weights = model.path / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.read_bytes() == (tmp_path / "blob").read_bytes()


def test_the_hub_is_asked_for_one_commit(
    run_stage: RunStage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo: str, *, local_dir: Path, **options: Any) -> None:
        asked.update(options, repo=repo)
        folder.rename(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    run_stage(Checkpoint(repo="org/model", revision=COMMIT))
    assert (asked["repo"], asked["revision"]) == ("org/model", COMMIT)
    assert "token" not in asked
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked["allow_patterns"])


def test_a_hub_out_of_reach_is_one_clear_error(
    run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(repo: str, **options: Any) -> None:
        raise OSError("network is unreachable\nand more")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"org/model .*network is unreachable \(.*'path'"):
        run_stage(Checkpoint(repo="org/model", revision=COMMIT))


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(), CheckpointError, "cannot fetch org/model .*: OSError"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left"),
    ],
)
def test_a_full_disk_is_not_blamed_on_the_hub(
    run_stage: RunStage,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    expected: type[Exception],
    message: str,
) -> None:
    def fetch(repo: str, **options: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(expected, match=message):
        run_stage(Checkpoint(repo="org/model", revision=COMMIT))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either 'path', or 'repo'"),
        ({"repo": "org/model"}, "belong together"),
        ({"repo": "org/model", "revision": "main"}, "no commit of 40"),
        ({"path": "no-such-folder"}, "no such file or folder"),
        ({"path": ".", "repo": "org/model", "revision": COMMIT}, "give either"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Checkpoint.model_validate(settings)
