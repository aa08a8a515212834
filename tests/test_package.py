"""What a user installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_carries_recipes_fragments_and_type_marks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "configs"):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"lifecycle/_bundled/{path.relative_to(ROOT).as_posix()}" in names
    assert {"lifecycle/py.typed", "serving/py.typed", "serving/cli.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]
