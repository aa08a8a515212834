from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from lifecycle.errors import StoreError
from lifecycle.training import snapshots
from lifecycle.training.snapshots import Snapshot, Snapshots


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"weight": torch.full((3, 5), float(step))}, {"average": step / 3})


def test_what_is_saved_is_read_back_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, print)
    assert kept.latest() is None
    for step in (1, 9, 10, 200):
        kept.save(snapshot(step))
    found = Snapshots(tmp_path, print).latest()
    assert found is not None
    assert (found.step, found.state) == (200, {"average": 200 / 3})
    assert torch.equal(found.tensors["weight"], snapshot(200).tensors["weight"])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut off", "flipped", "empty", "another name"])
def test_a_damaged_snapshot_is_ignored_with_a_line(tmp_path: Path, damage: str) -> None:
    Snapshots(tmp_path, print).save(snapshot(5))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "cut off":
        path.write_bytes(data[:-7])
    elif damage == "flipped":
        data[-3] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.rename(tmp_path / "7-not-a-digest.safetensors")
    lines: list[str] = []
    assert Snapshots(tmp_path, lines.append).latest() is None
    assert len(lines) == 1
    assert "damaged" in lines[0]


def test_an_older_whole_snapshot_is_better_than_none(tmp_path: Path) -> None:
    Snapshots(tmp_path, print).save(snapshot(5))
    (tmp_path / "00000009-0123456789abcdef.safetensors").write_bytes(b"half")
    found = Snapshots(tmp_path, print).latest()
    assert found is not None
    assert found.step == 5


def test_what_a_kill_left_behind_is_no_snapshot(tmp_path: Path) -> None:
    (tmp_path / ".writing").write_bytes(b"half")
    lines: list[str] = []
    kept = Snapshots(tmp_path, lines.append)
    assert kept.latest() is None
    kept.save(snapshot(1))
    assert kept.latest() is not None
    assert not lines


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Snapshots(tmp_path, print)
    kept.save(snapshot(1))

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "save_file", full)
    with pytest.raises(StoreError, match="No space left"):
        kept.save(snapshot(2))
    monkeypatch.undo()
    found = kept.latest()
    assert found is not None
    assert found.step == 1
