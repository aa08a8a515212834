"""Two models for all evaluations: one that knows the answers, one that knows less."""

from __future__ import annotations

import pytest

from lifecycle.kinds import HfModel, OnnxModel
from tests import tiny


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    """Knows every answer of `tiny.ROWS`."""
    return tiny.train(tmp_path_factory.mktemp("learnt") / "hf")


@pytest.fixture(scope="session")
def learnt_onnx(learnt: HfModel) -> OnnxModel:
    return tiny.export(learnt, learnt.path.parent / "onnx")


@pytest.fixture(scope="session")
def unlearnt(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    """The same architecture after a few steps: knows the form, not the answers."""
    return tiny.train(tmp_path_factory.mktemp("unlearnt") / "hf", seed=1, steps=6)


@pytest.fixture(scope="session")
def unlearnt_onnx(unlearnt: HfModel) -> OnnxModel:
    return tiny.export(unlearnt, unlearnt.path.parent / "onnx")
