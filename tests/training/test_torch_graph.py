"""Exported decoders in PyTorch compute what the models they come from do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lifecycle.errors import StageError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.training.torch_graph import TorchGraph
from tests.graph.models import MODELS, VOCAB, save_model, torch_logits

MIXTURES = {name for name, (kind, _) in MODELS.items() if kind in ("mixtral", "qwen3_moe")}
SHORT = {"phi3-long-rope": 30}
"""The context for which the first of two rotations is."""


@pytest.mark.parametrize("name", sorted(MODELS.keys() - MIXTURES))
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    (tmp_path / "graph").mkdir()
    export_decoder(tmp_path, tmp_path / "graph", Cpu())
    graph = TorchGraph(tmp_path / "graph", torch.device("cpu"))
    rng = np.random.default_rng(0)
    lengths = (SHORT.get(name, 60), 17, 1)
    texts = [rng.integers(3, VOCAB, length).tolist() for length in lengths]
    wanted = np.concatenate([torch_logits(model, text) for text in texts])
    np.testing.assert_allclose(graph.logits(texts).numpy(), wanted, atol=1e-4)


def test_constants_can_be_others(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    (tmp_path / "graph").mkdir()
    export_decoder(tmp_path, tmp_path / "graph", Cpu())
    graph = TorchGraph(tmp_path / "graph", torch.device("cpu"))
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(2)
    changed = {"norm.weight": 2 * graph.constants["norm.weight"]}
    found = graph.logits([[5, 6, 7]], changed).numpy()
    np.testing.assert_allclose(found, torch_logits(model, [5, 6, 7]), atol=1e-4)


@pytest.mark.parametrize(("name", "slots"), [("mixtral", None), ("llama", (2, 4))])
def test_what_cannot_be_trained_is_named(
    name: str, slots: tuple[int, int] | None, tmp_path: Path
) -> None:
    save_model(name, tmp_path)
    (tmp_path / "graph").mkdir()
    export_decoder(tmp_path, tmp_path / "graph", Cpu(), slots=slots)
    if slots is not None:
        (tmp_path / "graph" / "adapters.onnx").rename(tmp_path / "graph" / "model.onnx")
    with pytest.raises(StageError, match="with the operator .* cannot be trained"):
        TorchGraph(tmp_path / "graph", torch.device("cpu"))
