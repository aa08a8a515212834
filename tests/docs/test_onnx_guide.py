"""The guide's model and recipe run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.blocks import ROOT, blocks


def test_the_recipe_runs(tmp_path: Path) -> None:
    found = {block.language: block.text for block in blocks(ROOT / "docs" / "onnx.md")}
    (tmp_path / "digits.yaml").write_text(found["yaml"])
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    for command in (
        ["-c", found["python"]],
        ["-m", "lifecycle.cli", "run", "digits.yaml"],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "gated true" in done.stdout or "gated True" in done.stdout
