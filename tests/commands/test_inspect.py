"""`lifecycle inspect` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lifecycle.cli import main
from lifecycle.graph.blockwise import Blockwise
from tests.graph.models import export_quantized, save_model


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    save_model("llama", root)
    return export_quantized(root, Blockwise(32))


def test_layers_that_are_alike_share_a_line(graph: Path, capsys) -> None:
    assert main(["inspect", str(graph)]) == 0
    shown = capsys.readouterr().out
    assert "layers.*.mlp.down_proj.product (2×)" in shown
    assert "past_key_values.*.key (2×)" in shown
    assert "int4, blocks of 32" in shown
    assert main(["inspect", str(graph / "model.onnx"), "--all"]) == 0
    assert "layers.1.mlp.down_proj.product " in capsys.readouterr().out


def test_json(graph: Path, capsys) -> None:
    assert main(["inspect", str(graph), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(matrix["multiply_adds"] for matrix in found["matrices"]) == found["multiply_adds"]
    assert {port["name"] for port in found["outputs"]} >= {"logits", "present.0.key"}


def test_a_wrong_path_ends_with_one_line(tmp_path: Path, capsys) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "model.onnx does not exist" in capsys.readouterr().err
