"""Weights are read as float32 from every way of storing them; damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lifecycle import safetensors_file
from lifecycle.errors import CheckpointError
from lifecycle.graph import checkpoint as module
from lifecycle.graph.checkpoint import Checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_equal_torch(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "BLOCK", 10)
    tensor = torch.randn(7, 5).to(dtype)
    save_file({"other": torch.ones(3), "w": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    blocks = [block.copy() for block in checkpoint.blocks("w")]
    assert [len(block) for block in blocks] == [10, 10, 10, 5]
    assert np.array_equal(np.concatenate(blocks), tensor.float().numpy().ravel())
    assert checkpoint.shape("w") == (7, 5)
    assert checkpoint.unread == {"other"}


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    _write_shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert [float(next(checkpoint.blocks(name))[0]) for name in "ab"] == [1.0, 2.0]


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    _write_shards(tmp_path)
    save_file({"a": torch.full((2,), 3.0)}, tmp_path / module.SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == {"a"} and float(next(checkpoint.blocks("a"))[0]) == 3.0


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / module.INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is .*copy it again"):
        Checkpoint(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (3, "no tensor there but 3"),
        (ENTRY | {"dtype": ["F32"]}, "no tensor there"),
        (ENTRY | {"shape": "ab"}, "no tensor there"),
        (ENTRY | {"shape": [-2, -1]}, "no tensor there"),
        (ENTRY | {"shape": [2**63]}, "no tensor there"),
        (ENTRY | {"shape": [1] * 65}, "no tensor there"),
        (ENTRY | {"data_offsets": [-8, 0]}, "no tensor there"),
        (ENTRY | {"data_offsets": ["0", 8]}, "no tensor there"),
        (ENTRY | {"data_offsets": [8]}, "no tensor there"),
        (ENTRY | {"shape": [2, 2]}, r"8 bytes do not hold F32 \[2, 2\]"),
        (ENTRY | {"dtype": "F16"}, "8 bytes do not hold F16"),
    ],
)
def test_a_damaged_entry_names_its_tensor(entry: object, named: str, tmp_path: Path) -> None:
    _write_header(tmp_path, {"w": entry, "v": ENTRY})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: w: .*{named}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([(0, 8), (8, 16)], None),
        ([(8, 16), (0, 8)], None),
        ([(0, 8), (0, 8)], "b begins at byte .*copy the file again"),
        ([(0, 8), (2**40, 2**40 + 8)], "b begins at byte"),
        ([(8, 16)], "a begins at byte"),
        ([(0, 8)], "only .* hold tensors; copy it again"),
        ([], "only .* hold tensors"),
        ([(0, 8), (8, 16), (16, 24)], "is cut off"),
    ],
)
def test_tensors_lie_one_behind_the_other(
    offsets: list[tuple[int, int]], said: str | None, tmp_path: Path
) -> None:
    """So a file of terabytes without content, which costs nobody anything, cannot be one that is read."""
    pairs = zip("abc", offsets, strict=False)
    _write_header(tmp_path, {name: ENTRY | {"data_offsets": pair} for name, pair in pairs})
    if said is None:
        Checkpoint(tmp_path)
        return
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("header", ["x", 3, []])
def test_a_header_that_is_no_object_is_refused(header: object, tmp_path: Path) -> None:
    _write_header(tmp_path, header)
    with pytest.raises(CheckpointError, match="no safetensors file: its header is no JSON object"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    _write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        Checkpoint(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / module.INDEX).write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint(tmp_path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x04\0\0\0\0\0\0\0nope"])
def test_other_files_are_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint(tmp_path)


def test_a_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="any code"):
        Checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_its_tensor(bad: float, tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, bad])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w holds values that are not finite"):
        list(Checkpoint(tmp_path).blocks("w"))


def test_a_missing_tensor_names_the_nearest(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"did you mean 'model\.norm\.weight'"):
        Checkpoint(tmp_path).shape("model.norms.weight")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stored as I8"):
        list(Checkpoint(tmp_path).blocks("w"))


def _write_header(folder: Path, header: object) -> None:
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(16)
    (folder / module.SINGLE).write_bytes(content)


def _write_shards(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.full((2,), 2.0)}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / module.INDEX).write_text(json.dumps(index))
