"""Texts that are, or grow, beyond the first context of a model with a rotation for long ones."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.graph.models import VOCAB, save_model, torch_logits

LENGTHS = (5, 20, 31, 32, 33, 50)
"""Of prompts; the model's first context has 32 tokens."""
COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("long")
    save_model("phi3-long-rope", root)
    (root / "onnx").mkdir()
    export_decoder(root, root / "onnx", Cpu())
    return root


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Greedy answers without any cache: each token from one pass over the whole text."""
    model = save_model("phi3-long-rope", tmp_path_factory.mktemp("reference"))
    answers: list[list[int]] = []
    for prompt in prompts():
        ids = list(prompt)
        while len(ids) < len(prompt) + COUNT:
            ids.append(int(torch_logits(model, ids)[-1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB, length).tolist() for length in LENGTHS]


def open_engine(kind: type[OnnxEngine | TorchEngine], folder: Path) -> Engine:
    path = folder / "onnx" if kind is OnnxEngine else folder
    return kind.open(path, EngineOptions(max_num_seqs=4, prefill_chunk=16))


@pytest.mark.parametrize("kind", [OnnxEngine, TorchEngine])
def test_answers_are_those_of_whole_passes(
    kind: type[OnnxEngine | TorchEngine], folder: Path, wanted: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    with closing(open_engine(kind, folder)) as engine:
        found = engine.generate(prompts(), params)
    assert [list(answer.token_ids) for answer in found] == wanted


@pytest.mark.parametrize("kind", [OnnxEngine, TorchEngine])
@pytest.mark.parametrize("length", [32, 40])
def test_logits_are_those_of_one_pass(
    kind: type[OnnxEngine | TorchEngine], length: int, folder: Path, tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(3, VOCAB, length).tolist()
    reference = torch_logits(save_model("phi3-long-rope", tmp_path), ids)
    with closing(open_engine(kind, folder)) as engine:
        assert np.abs(engine.logits(ids) - reference).max() < 1e-4
