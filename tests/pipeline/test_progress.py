from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lifecycle.pipeline.progress import LiveDisplay, PlainDisplay, StageProgress, Stop


def test_names_are_shown_as_they_are_and_never_read_as_markup() -> None:
    display = LiveDisplay()
    display.close()
    display.console = Console(file=io.StringIO(), width=120)
    display.started("a", "./[/b]/file.py:Stage")
    display.advance("a", "epoch [1/3]", 1, 2, {"top[/1]": 0.5})
    assert len(list(display._bar.get_renderables())) == 1
    display.ended("a", "./[/b]/file.py:Stage", "done", 1.0, "top[1] 0.5")
    shown = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert "./[/b]/file.py:Stage" in shown
    assert "top[1] 0.5" in shown


def test_a_phase_is_shown_before_its_first_update(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lifecycle.pipeline.progress.PLAIN_EVERY", 0.0)
    display = PlainDisplay(io.StringIO())
    progress = StageProgress("onnx", "export", display, tmp_path / "record", Stop())
    progress.phase("comparing")
    progress.update(1, 2)
    assert display.stream.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "[onnx] comparing",
        "[onnx] comparing 1/2",
    ]
