"""Small models, exported once: one with random weights, one that was really trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from lifecycle.engines import pytorch_adapters
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.engines.adapted import FORMS, SLOTS, make_adapted


@dataclass(frozen=True)
class Model:
    """A checkpoint and its float32 graph."""

    checkpoint: Path
    graph: Path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Llama with random weights: 160 tokens, 256 positions, rotary inside the attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Large enough for the tokens to depend on the text.
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return exported(LlamaForCausalLM(config), tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def stories(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """stories260K: a real Llama, with its rotary in front of the attention."""
    checkpoint = data_dir / "stories260K" / "hf"
    graph = tmp_path_factory.mktemp("stories")
    export_decoder(checkpoint, graph, Cpu())
    return Model(checkpoint, graph)


@pytest.fixture(scope="session")
def story(data_dir: Path) -> list[int]:
    """The published greedy text of stories260K, as token ids."""
    path = data_dir / "stories260K" / "expected_greedy.json"
    return json.loads(path.read_text(encoding="utf-8"))["greedy_ids_numpy"]


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with slots in both forms, and five different adapters; see `tests.engines.adapted`."""
    root = tmp_path_factory.mktemp("adapted")
    make_adapted(root, SLOTS, adapters=5)
    return root


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, adapted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One form of it. Both engines have as many slots."""
    monkeypatch.setattr(pytorch_adapters, "SLOTS", SLOTS)
    return adapted / request.param


def exported(model: PreTrainedModel, folder: Path) -> Model:
    """Both forms of a model, in `folder`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    checkpoint, graph = folder / "hf", folder / "onnx"
    model.save_pretrained(checkpoint)
    graph.mkdir()
    export_decoder(checkpoint, graph, Cpu())
    return Model(checkpoint, graph)
