"""Model folders from outside: what is taken from them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, cast

from lifecycle.data.chat import ChatTokenizer
from lifecycle.errors import CheckpointError
from lifecycle.graph.checkpoint import INDEX, SINGLE, Checkpoint
from lifecycle.json_file import read_object
from lifecycle.pipeline.artifact import Metrics

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")
"""The files that are taken, of those at the top of the folder: no code, no pickles."""


def inspect(folder: Path) -> Metrics:
    """Check that a model folder is complete and safe, reading headers and not the weights.

    Returns:
        `model_type`, `parameters` and `tensors`.

    Raises:
        CheckpointError: something is missing, damaged, cut off, or only there as a pickle.
    """
    config = _read_config(folder)
    named = _named_tensors(folder)
    weights = Checkpoint(folder)
    if missing := sorted(named.keys() - weights.tensors.keys()):
        raise CheckpointError(
            f"{folder / named[missing[0]]} has no tensor '{missing[0]}', though {INDEX} names "
            "it there; copy the checkpoint again"
        )
    _require_tokenizer(folder)
    return {
        "model_type": config["model_type"],
        "parameters": sum(prod(tensor.shape) for tensor in weights.tensors.values()),
        "tensors": len(weights.tensors),
    }


def files_to_take(folder: Path) -> Iterator[Path]:
    """The files of a checked folder that become part of the artifact, sorted."""
    named = _named_tensors(folder)
    weights = {INDEX, *named.values()} if named else {SINGLE}
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}):
        holds_weights = path.suffix == ".safetensors" or path.name == INDEX
        if path.is_file() and (not holds_weights or path.name in weights):
            yield path


def ignored_code(folder: Path) -> list[str]:
    """The files and settings by which a folder asks that its own code be run."""
    found = [path.name for path in sorted(folder.glob("*.py"))]
    if "auto_map" in _read_config(folder):
        found.append("auto_map of config.json")
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        # transformers would load the base model that it names, whatever weights lie here.
        raise CheckpointError(
            f"{folder} is a PEFT adapter, not a model; merge it into its base model first, or "
            "take adapter_config.json away if the weights beside it are merged"
        )
    if not path.is_file():
        raise CheckpointError(f"{folder} is no model folder: it has no config.json")
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} has no model_type, so its architecture is unknown")
    return config


def _named_tensors(folder: Path) -> dict[str, str]:
    """The shard of every tensor, as the index says; empty for a model in one file, which comes
    before an index."""
    path = folder / INDEX
    if (folder / SINGLE).is_file() or not path.is_file():
        return {}
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{path} is damaged: it has no weight_map")
    return cast("dict[str, str]", shards)


def _require_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{folder} has its tokeniser only as SentencePiece (tokenizer.model); convert it "
            "once with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of "
            "transformers, which writes tokenizer.json"
        )
    ChatTokenizer.load(folder)
