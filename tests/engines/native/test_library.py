"""Compiling the kernels, and what happens where that cannot be."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.native import library
from lifecycle.engines.native.compiler import SOURCES
from lifecycle.engines.ort import OnnxEngine
from lifecycle.errors import EngineError
from tests.engines.conftest import Model

CALLS = 1 + len(list(SOURCES.glob("*.cpp")))
"""Of a compiler: for each source, and to link."""


@pytest.fixture
def real() -> Path:
    """A library that can be loaded."""
    found = library.kernels_for("native")
    assert found is not None
    return found


@pytest.fixture
def empty(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user who has compiled nothing yet: the folder of kernels, which is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_FAST", frozenset())
    library.forget()
    yield tmp_path / "lifecycle" / "kernels"
    library.forget()


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A compiler that notes each call and does what a script says; $out is the file to be made."""
    path = folder / "cxx"
    find = 'for a; do [ "$before" = -o ] && out="$a"; before="$a"; done'
    path.write_text(f'#!/bin/sh\n{find}\necho called >> "{folder}/calls"\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return folder / "calls"


def test_one_of_many_compiles(
    empty: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(tmp_path, monkeypatch, f'sleep 0.2; cp "{real}" "$out"')
    threads = [threading.Thread(target=library.kernels_for, args=("native",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.read_text() == "called\n" * CALLS
    found = library.kernels_for("auto")
    assert found is not None and found.read_bytes() == real.read_bytes()
    assert sorted(path.name for path in empty.iterdir()) == [found.name, "lock"]
    assert empty.stat().st_mode & 0o022 == found.stat().st_mode & 0o022 == 0
    # Another process finds it, without a compiler.
    library.forget()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    assert library.kernels_for("auto") == found


def test_a_compiler_that_fails_leaves_nothing(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = compiler(
        tmp_path, monkeypatch, 'echo x > "$out"; echo "a.cpp:1: error: no" >&2; exit 1'
    )
    with pytest.raises(EngineError, match=r"could not be compiled .*a\.cpp:1: error: no .*CXX"):
        library.kernels_for("native")
    assert [path.name for path in empty.iterdir()] == ["lock"]
    library.forget()
    with caplog.at_level(logging.WARNING):
        assert library.kernels_for("auto") is None
    assert "engines use ONNX Runtime's kernels: native kernels could not" in caplog.text
    # It is told and tried once, not with every engine.
    caplog.clear()
    tried = calls.read_text()
    assert library.kernels_for("auto") is None
    assert not caplog.text and calls.read_text() == tried


def test_a_library_that_does_not_load(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path, monkeypatch, 'echo library > "$out"')
    with pytest.raises(EngineError, match=r"cannot be had from .*kernels-.*file too short"):
        library.kernels_for("native")
    assert library.kernels_for("auto") is None


def test_a_library_of_another_system_is_made_anew(
    empty: Path, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty.mkdir(parents=True)
    library.library_path().write_text("made elsewhere")
    old = empty / "kernels-0000000000000000.so"
    old.write_text("")
    os.utime(old, (0, 0))
    calls = compiler(tmp_path, monkeypatch, f'cp "{real}" "$out"')
    found = library.kernels_for("native")
    assert found is not None and found.read_bytes() == real.read_bytes()
    assert calls.read_text() == "called\n" * CALLS and not old.exists()


def test_what_was_compiled_is_used_where_nothing_may_be_written(
    empty: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty.mkdir(parents=True)
    shutil.copy(real, library.library_path())
    (empty / "lock").mkdir()
    assert library.kernels_for("native") == library.library_path()


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")

    def home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", home)
    assert "XDG_CACHE_HOME" in (library.why_not() or "")
    assert library.kernels_for("auto") is None
    with pytest.raises(EngineError, match="there is no home"):
        library.kernels_for("native")


def test_without_a_compiler(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in (library.why_not() or "")
    assert library.kernels_for("auto") is None
    with pytest.raises(EngineError, match=r"there is no C\+\+ compiler: install one .*CXX"):
        library.kernels_for("native")


def test_processors_on_which_ours_are_not_known_to_be_faster(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_FAST", frozenset({"avx512f", "no_such_thing"}))
    assert "no_such_thing" in (library.why_not() or "")
    assert library.kernels_for("auto") is None


@pytest.mark.parametrize("which", ["file", "folder", "parent"])
def test_what_others_may_write_to_is_not_loaded(empty: Path, real: Path, which: str) -> None:
    empty.mkdir(parents=True)
    shutil.copy(real, library.library_path())
    places = {"file": library.library_path(), "folder": empty, "parent": empty.parent}
    places[which].chmod(0o777)
    with pytest.raises(EngineError, match=r"others own .* or may write .*delete"):
        library.kernels_for("native")


def test_a_file_where_the_folder_should_be(empty: Path) -> None:
    empty.parent.write_text("")
    with pytest.raises(EngineError, match=r"cannot be had from .*kernels"):
        library.kernels_for("native")


def test_what_an_engine_runs(random_model: Model, tmp_path: Path) -> None:
    def kernels(**options: object) -> str | None:
        engine = OnnxEngine.open(random_model.graph, EngineOptions(1, **options))
        return engine.kernels

    assert kernels(kernels="native") == "native"
    assert kernels(kernels="onnxruntime") == "onnxruntime"
    assert kernels() == ("onnxruntime" if library.why_not() else "native")
    assert kernels(packed_weights=tmp_path) == "onnxruntime"
    with pytest.raises(EngineError, match="packed weights are kept as ONNX Runtime's"):
        kernels(packed_weights=tmp_path, kernels="native")
    with pytest.raises(EngineError, match="kernels is 'fast'; it must be auto, native or onnx"):
        kernels(kernels="fast")
