"""Every block of the README does what it says; the quickstart runs in its reduced form."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks
from tests.reduced import OVERRIDES

BLOCKS = blocks(ROOT / "README.md")
COMMANDS = [
    line
    for block in BLOCKS
    if block.language == "bash"
    for line in block.text.splitlines()
    if not line.startswith("#")
]


def texts(language: str) -> list[str]:
    return [block.text for block in BLOCKS if block.language == language]


def lifecycle(line: str) -> list[str]:
    """The command of a line; the quickstart in its reduced form."""
    words = shlex.split(line)
    extra = OVERRIDES if words[1] in ("run", "plan") and words[2] == "quickstart" else ()
    return [sys.executable, "-m", "lifecycle.cli", *words[1:], *extra]


def test_no_kind_of_block_is_overlooked() -> None:
    assert {block.language for block in BLOCKS} == {"bash", "yaml", "python", ""}
    assert {line.split()[0] for line in COMMANDS} == {"make", "pip", "lifecycle"}


def test_the_recipe_shown_is_the_one_that_ships() -> None:
    assert texts("yaml")[0] == (ROOT / "recipes" / "quickstart.yaml").read_text("utf-8")


def test_make_targets_and_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "make":
            subprocess.run(
                ["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
        elif words[0] == "pip":
            assert words[1:] == ["install", ".[all]"]
            assert words[2][2:-1] in extras


def test_the_tree_is_the_tree() -> None:
    (tree,) = texts("")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    files = {Path(name).parts for name in tracked if (ROOT / name).exists()}
    top = {parts[0] + ("/" if len(parts) > 1 else "") for parts in files}
    packages = {parts[1] for parts in files if parts[0] == "lifecycle" and len(parts) > 1}
    packages = {name + ("/" if not name.endswith((".py", ".typed")) else "") for name in packages}
    shown = [line.split()[0] for line in tree.splitlines()]
    assert set(shown) == (top - {".gitignore", ".pre-commit-config.yaml"}) | (
        packages - {"__init__.py", "py.typed"}
    )


@pytest.fixture(scope="module")
def environment(quickstart_store: Path) -> dict[str, str]:
    return os.environ | {"LIFECYCLE_STORE": str(quickstart_store)}


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("lifecycle ")])
def test_commands(line: str, environment: dict[str, str], tmp_path: Path) -> None:
    if " serve " in line:
        return  # The server's own test, below, asks it.
    done = subprocess.run(
        lifecycle(line), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def server(environment: dict[str, str]) -> Iterator[None]:
    (line,) = [c for c in COMMANDS if " serve " in c]
    run = lifecycle("lifecycle run quickstart")
    subprocess.run(run, env=environment, check=True, capture_output=True, timeout=600)
    process = subprocess.Popen(lifecycle(line), env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "http://127.0.0.1:8000" in process.stdout.readline()
    yield
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_the_client_is_answered() -> None:
    (code,) = texts("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_recipe_for_your_model(tmp_path: Path, data_dir: Path) -> None:
    text = texts("yaml")[1]
    folder = tmp_path / "path" / "to"
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(data_dir / "stories260K" / "hf")
    (tmp_path / "mine.yaml").write_text(text)
    run = [sys.executable, "-m", "lifecycle.cli", "run", "mine.yaml"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
