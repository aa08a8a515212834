from __future__ import annotations

import io

from rich.console import Console

from lifecycle.pipeline.progress import LiveDisplay


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
