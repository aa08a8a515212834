"""Models that several test files of the graph share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.graph.models import save_model


@pytest.fixture(scope="session")
def stories(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported graph of a real trained model with 260 thousand parameters."""
    out = tmp_path_factory.mktemp("stories")
    export_decoder(data_dir / "stories260K" / "hf", out, Cpu())
    return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported graph of a random Llama with tied embeddings."""
    root = tmp_path_factory.mktemp("tiny")
    save_model("llama-tied", root)
    out = root / "onnx"
    out.mkdir()
    export_decoder(root, out, Cpu())
    return out
