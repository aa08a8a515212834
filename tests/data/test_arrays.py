"""Samples for graphs: what is read, how it is split, and what is refused."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lifecycle.data.arrays import Input, read_samples
from lifecycle.errors import DataError

IMAGE = Input("image", "float32", ("batch", 3, 4))
IDS, MASK = (Input(name, "int64", ("batch", "length")) for name in ("ids", "mask"))


def test_a_file_of_many_samples(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float64).reshape(5, 3, 4)
    np.savez(tmp_path / "a.npz", image=values)
    np.save(tmp_path / "a.npy", values)
    for name in ("a.npz", "a.npy"):
        found = [s["image"] for s in read_samples(tmp_path / name, [IMAGE])]
        assert np.array_equal(np.concatenate(found), values)
        assert {(a.shape, a.dtype) for a in found} == {((1, 3, 4), np.dtype(np.float32))}


def test_a_fixed_batch_takes_so_many_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((6, 3, 4), np.float32))
    fixed = Input("image", "float32", (2, 3, 4))
    assert len(list(read_samples(tmp_path / "a.npz", [fixed]))) == 3
    np.savez(tmp_path / "a.npz", image=np.zeros((7, 3, 4), np.float32))
    with pytest.raises(DataError, match="'image' has 7 rows, no multiple of 2"):
        list(read_samples(tmp_path / "a.npz", [fixed]))


def test_an_axis_in_front_counts_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((6, 2, 3, 4), np.float32))
    assert [s["image"].shape for s in read_samples(tmp_path / "a.npz", [IMAGE])] == [(2, 3, 4)] * 6


def test_rows_and_folders_hold_samples_of_any_length(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    rows = [{"ids": [1] * n, "mask": [1] * n} for n in (3, 5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, row in enumerate(rows):
        np.savez(folder / f"{number}.npz", **{k: np.array([v]) for k, v in row.items()})
    for path in (tmp_path / "a.jsonl", folder):
        assert [s["ids"].shape for s in read_samples(path, [IDS, MASK])] == [(1, 3), (1, 5)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ids": [1]}, "line 1: 'mask' is missing; the graph takes ids, mask"),
        ({"ids": [1], "maks": [1]}, "no input 'maks'; did you mean 'mask'"),
        ({"ids": [1], "mask": [1, 2]}, "'length' is 1 in 'ids' but 2 in 'mask'"),
        ({"ids": [1.5], "mask": [1]}, "'ids' is float64, the graph takes int64"),
        ({"ids": [[[1]]], "mask": [1]}, r"'ids' has shape \[1, 1, 1\].*\[batch, length\]"),
        ({"ids": [[1], [1, 2]], "mask": [1]}, "'ids' is no array"),
        ({"ids": ["a"], "mask": [1]}, "'ids' is <U1, the graph takes int64"),
    ],
)
def test_what_does_not_fit_is_named(row: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        list(read_samples(tmp_path / "a.jsonl", [IDS, MASK]))


def test_numbers_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[300]]))
    with pytest.raises(DataError, match="values that uint8 cannot hold"):
        list(read_samples(tmp_path / "a.npy", [Input("x", "uint8", ("n", 1))]))
    np.save(tmp_path / "a.npy", np.array([[np.nan]]))
    with pytest.raises(DataError, match="not finite"):
        list(read_samples(tmp_path / "a.npy", [Input("x", "float32", ("n", 1))]))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as arrays of numbers"):
        list(read_samples(tmp_path / "a.npy", [IMAGE]))
    np.savez(tmp_path / "b.npz", image=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as arrays of numbers"):
        list(read_samples(tmp_path / "b.npz", [IMAGE]))


def test_different_numbers_of_samples_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", ids=np.ones((3, 2), np.int64), mask=np.ones((4, 2), np.int64))
    with pytest.raises(DataError, match="3 for 'ids', 4 for 'mask'"):
        list(read_samples(tmp_path / "a.npz", [IDS, MASK]))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    with pytest.raises(DataError, match=r"is none of \.npz, \.npy"):
        list(read_samples(tmp_path / "a.pt", [IMAGE]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no file that ends in"):
        list(read_samples(tmp_path / "empty", [IMAGE]))


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


HUGE = _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 12}, 3)}}")


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("image", b"no array", "'image' is no array"),
        ("image.npy", HUGE, "cannot be read as arrays of numbers: Unable to allocate"),
        ("image.npy", HUGE.replace(b"9" * 12, b"9" * 30), "cannot be read as arrays"),
        ("image.npy", _npy("{'descr': '<f4'"), "cannot be read as arrays of numbers"),
    ],
)
def test_a_hostile_archive_is_refused(
    member: str, content: bytes, message: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(member, content)
    with pytest.raises(DataError, match=message):
        list(read_samples(tmp_path / "a.npz", [IMAGE]))


def test_what_the_graph_does_not_take_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", HUGE)
        archive.writestr("other.npy", HUGE)
    with pytest.raises(DataError, match="no input 'other'"):
        list(read_samples(tmp_path / "a.npz", [IMAGE]))


def test_an_archive_larger_than_the_memory_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifecycle.data.arrays.available_memory", lambda: 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", image=np.zeros((1 << 17, 3, 4), np.float32))
    with pytest.raises(DataError, match="unpacks to 6 MiB, and 1 MiB are free"):
        list(read_samples(tmp_path / "a.npz", [IMAGE]))


def test_no_damage_goes_through_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "a.npz", image=random.standard_normal((2, 3, 4)))
    whole = (tmp_path / "a.npz").read_bytes()
    for _ in range(500):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 2):
            damaged[at] = random.integers(0, 256)
        (tmp_path / "b.npz").write_bytes(damaged)
        with contextlib.suppress(DataError):
            list(read_samples(tmp_path / "b.npz", [IMAGE]))
