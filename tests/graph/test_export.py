"""A checkpoint that its config does not describe is refused; the same one gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lifecycle.errors import CheckpointError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.pipeline.artifact import hash_tree
from tests.graph.models import save_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Llama with an output head of its own."""
    save_model("llama", tmp_path / "hf")
    return tmp_path / "hf"


def export(checkpoint: Path, name: str = "onnx") -> Path:
    out = checkpoint.parent / name
    out.mkdir()
    export_decoder(checkpoint, out, Cpu())
    return out


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path) -> None:
    assert hash_tree(export(checkpoint, "one")) == hash_tree(export(checkpoint, "two"))


def test_a_tensor_without_a_place_is_named(checkpoint: Path) -> None:
    _change_weights(checkpoint, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(CheckpointError, match=r"q_proj\.bias' has no place"):
        export(checkpoint)


def test_left_over_rotary_tables_are_fine(checkpoint: Path) -> None:
    _change_weights(checkpoint, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    export(checkpoint)


def test_a_shape_that_the_config_does_not_give_is_named(checkpoint: Path) -> None:
    _change_weights(checkpoint, {"model.norm.weight": torch.ones(63)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \[63\].*\[64\]"):
        export(checkpoint)
    _change_weights(checkpoint, {"model.norm.weight": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \[\].*\[64\]"):
        export(checkpoint, "again")


@pytest.mark.parametrize("kept", ["embedding", "head", "both"])
def test_tied_matrices_may_be_stored_under_either_name(kept: str, tmp_path: Path) -> None:
    save_model("llama-tied", tmp_path / "hf")
    wanted = hash_tree(export(tmp_path / "hf", "wanted"))
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    if kept != "embedding":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if kept == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert hash_tree(export(tmp_path / "hf")) == wanted


@pytest.mark.parametrize("head", [torch.zeros(96, 64), torch.zeros(64, 96)])
def test_a_tied_head_that_differs_is_named(head: torch.Tensor, tmp_path: Path) -> None:
    save_model("llama-tied", tmp_path / "hf")
    _change_weights(tmp_path / "hf", {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"lm_head.*differs.*embed_tokens.*to false"):
        export(tmp_path / "hf")


@pytest.mark.parametrize(
    ("ends", "wanted"), [(5, (5,)), ([5, 6], (5, 6)), (None, ()), ("absent", (2,))]
)
def test_ends_come_from_the_generation_config_first(
    ends: object, wanted: tuple[int, ...], checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    if ends is None:
        (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    values = {} if ends == "absent" else {"eos_token_id": ends}
    (checkpoint / "generation_config.json").write_text(json.dumps(values))
    out = checkpoint.parent / "onnx"
    out.mkdir()
    assert export_decoder(checkpoint, out, Cpu()).eos_token_ids == wanted


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("generation_config.json", [], r"generation_config\.json is damaged"),
        ("generation_config.json", {"eos_token_id": "2"}, r"generation_config\.json: eos.*'2'"),
        ("config.json", {"eos_token_id": [2.5]}, r"^config\.json: eos_token_id"),
        ("config.json", {"bos_token_id": [1]}, r"^config\.json: bos_token_id"),
    ],
)
def test_wrong_ends_are_named(file: str, content: object, named: str, checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text("{}")
    if file == "config.json" and isinstance(content, dict):
        content = json.loads((checkpoint / file).read_text()) | content
    (checkpoint / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=named):
        export(checkpoint)


@pytest.mark.parametrize("content", [None, "{", "[]", "3"])
def test_a_config_that_cannot_be_read_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is"):
        export_decoder(tmp_path, tmp_path, Cpu())


def _change_weights(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file)
