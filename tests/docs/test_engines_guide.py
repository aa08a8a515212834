"""The guide to the engines: its blocks run one after another beside an exported model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.docs.blocks import ROOT, blocks


def test_its_python_runs_beside_a_model(data_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    export_decoder(data_dir / "stories260K" / "hf", model, Cpu(), hidden_states=True)
    found = blocks(ROOT / "docs" / "engines.md")
    code = "\n".join(block.text for block in found if block.language == "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[4:] == ["(2, 64)"]
