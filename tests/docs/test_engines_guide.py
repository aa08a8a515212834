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
    checkpoint = data_dir / "stories260K" / "hf"
    export_decoder(checkpoint, model, Cpu(), hidden_states=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).symlink_to(checkpoint / name)
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
    lines = done.stdout.splitlines()
    assert lines[2] == ", there was a little"
    events = [line.split() for line in lines[3:-3]]
    assert [event[0] for event in events].count("urgent") == 5 == len(events) - 5
    assert lines[-1] == "(2, 64)"
