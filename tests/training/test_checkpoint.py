"""What a model folder from outside can be wrong in, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lifecycle.errors import CheckpointError
from lifecycle.training.checkpoint import files_to_take, ignored_code, inspect
from tests.tiny import write_tokenizer
from tests.training.conftest import tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two shards."""
    path = tmp_path / "model"
    tiny_model().save_pretrained(path, max_shard_size="40KB")
    assert (path / INDEX).is_file()
    write_tokenizer(path)
    return path


def test_a_whole_folder(folder: Path) -> None:
    found = inspect(folder)
    assert found["model_type"] == "llama"
    assert found["parameters"] == sum(weight.numel() for weight in tiny_model().parameters())
    assert {path.name for path in files_to_take(folder)} == {p.name for p in folder.iterdir()}


def test_code_pickles_and_other_weights_are_left_behind(folder: Path) -> None:
    before = {path.name for path in files_to_take(folder)}
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (folder / name).write_bytes(b"x")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    inspect(folder)
    assert {path.name for path in files_to_take(folder)} == before
    assert ignored_code(folder) == ["modeling.py", "auto_map of config.json"]


def test_a_single_file_comes_before_an_index(folder: Path) -> None:
    tiny_model().save_pretrained(folder)
    index = {"weight_map": {"gone": "gone.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    inspect(folder)
    taken = {path.name for path in files_to_take(folder)}
    assert {name for name in taken if "safetensors" in name} == {"model.safetensors"}


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def no_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def missing_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


def cut_shard(folder: Path) -> None:
    shards(folder)[0].write_bytes(shards(folder)[0].read_bytes()[:-50])


def missing_tensor(folder: Path) -> None:
    tensors = load_file(shards(folder)[0])
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shards(folder)[0])


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def only_pickle(folder: Path) -> None:
    for shard in shards(folder):
        shard.unlink()
    (folder / INDEX).unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    only_pickle(folder)
    (folder / "pytorch_model.bin").unlink()


def only_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "has no config.json"),
        (only_adapter, "PEFT adapter"),
        (adapter_beside, "PEFT adapter.*take adapter_config.json away"),
        (broken_config, "config.json is damaged"),
        (no_type, "no model_type"),
        (missing_shard, "model-00002-of-0000. is missing|model-00002.* is missing"),
        (cut_shard, "model-00001.* is cut off"),
        (missing_tensor, "model-00001.* has no tensor"),
        (broken_index, "index.json is damaged"),
        (index_without_map, "no weight_map"),
        (only_pickle, "pickle.*can run any code.*safetensors"),
        (no_weights, "has no weights"),
        (only_sentencepiece, "SentencePiece.*save_pretrained"),
        (no_tokenizer, "has no tokenizer.json"),
        (broken_tokenizer, "is no tokeniser"),
    ],
)
def test_one_clear_error(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        inspect(folder)
