"""The generated reference says what the code says."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.docs.blocks import ROOT


def _generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["stages.md", "architectures.md", "commands.md"])
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words differ by version")
def test_the_reference_is_not_stale(name: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "96")
    written = (ROOT / "docs" / "reference" / name).read_text("utf-8")
    assert written == _generate().pages()[name], "run `make docs`"
