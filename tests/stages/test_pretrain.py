from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lifecycle.errors import DataError, StageError
from lifecycle.kinds import HfModel, Text, Tokenizer
from lifecycle.pipeline.artifact import hash_tree
from lifecycle.stages.pretrain import Pretrain
from lifecycle.training.models import load_model
from tests.conftest import QuietProgress, RunStage, as_artifact
from tests.tiny import write_tokenizer
from tests.training.conftest import TINY

SENTENCES = ["the cat sees a dog", "a dog sees the cat", "one bird sings", "the bird flies high"]


@pytest.fixture
def text(tmp_path: Path) -> Text:
    folder = tmp_path / "text"
    folder.mkdir()
    rows = [{"text": " ".join(SENTENCES[i:] + SENTENCES[:i]), "source": "x"} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines * 8)
    (folder / "test.jsonl").write_text(lines)
    return as_artifact(Text, folder)  # type: ignore[return-value]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "tokenizer")
    return as_artifact(Tokenizer, tmp_path / "tokenizer")  # type: ignore[return-value]


def stage(**settings: Any) -> Pretrain:
    values: dict[str, Any] = {
        "text": "text",
        "tokenizer": "tokens",
        "architecture": TINY,
        "context_length": 32,
        "steps": 30,
        "learning_rate": 1e-2,
        "threads": 1,
    }
    return Pretrain.model_validate(values | settings)


def test_a_model_that_has_learnt_something(
    run_stage: RunStage, text: Text, tokenizer: Tokenizer
) -> None:
    model = run_stage(stage(), text=text, tokens=tokenizer)
    assert isinstance(model, HfModel)
    metrics = model.metrics
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["perplexity"] < 20 < model.config["vocab_size"]
    assert metrics["steps"] == 30
    assert metrics["tokens_per_second"] > 0
    generation = json.loads((model.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0]
    assert {file.path for file in model.files} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load_model(model.path).dtype == torch.float32


def test_the_same_bytes_every_time(run_stage: RunStage, text: Text, tokenizer: Tokenizer) -> None:
    first = run_stage(stage(steps=3), text=text, tokens=tokenizer)
    second = run_stage(stage(steps=3), text=text, tokens=tokenizer)
    assert hash_tree(first.path) == hash_tree(second.path)


def test_a_short_test_split_is_said_and_costs_only_its_loss(
    run_stage: RunStage, text: Text, tokenizer: Tokenizer
) -> None:
    (text.path / "test.jsonl").write_text('{"text": "a cat", "source": "x"}\n')
    model = run_stage(stage(steps=2), text=text, tokens=tokenizer)
    assert "loss" not in model.metrics
    progress: QuietProgress = model.ctx.progress  # type: ignore[attr-defined]
    assert any("no loss on the test split" in line for line in progress.lines)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"context_length": 128}, StageError, "max_position_embeddings is 64"),
        ({"architecture": {**TINY, "layers": 2}}, StageError, "architecture: layers"),
        ({"device": "abacus"}, StageError, "device"),
    ],
)
def test_settings_that_cannot_work(
    run_stage: RunStage,
    text: Text,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run_stage(stage(**settings), text=text, tokens=tokenizer)


def test_an_empty_text(run_stage: RunStage, text: Text, tokenizer: Tokenizer) -> None:
    (text.path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="fewer than one row"):
        run_stage(stage(), text=text, tokens=tokenizer)
