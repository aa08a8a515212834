"""Plug-ins as an outside package brings them: installed metadata in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from lifecycle.errors import PluginError
from lifecycle.pipeline import registry
from lifecycle.pipeline.stage import Stage
from tests.pipeline.toys import Shape, Square


def test_every_built_in_comes_through_the_entry_points() -> None:
    for group in registry.GROUPS:
        assert registry.names(group), f"{group} is empty"


@pytest.mark.parametrize("group", registry.GROUPS)
def test_every_built_in_can_be_loaded(group: str) -> None:
    for name in registry.names(group):
        if group == registry.ARCHITECTURES:
            found = registry.load_function(group, name)
        else:
            found = registry.load(group, name, object)
        assert found.__module__.startswith("lifecycle.")


def test_a_class_is_no_function() -> None:
    with pytest.raises(PluginError, match="'merge' is no function"):
        registry.load_function(registry.STAGES, "merge")


def test_unknown_names_get_a_suggestion_and_the_list() -> None:
    with pytest.raises(PluginError, match=r"unknown stage 'merg'; did you mean 'merge'.*known: "):
        registry.load(registry.STAGES, "merg", Stage)


class Holder(BaseModel):
    shape: Shape


def test_a_plug_in_is_picked_by_use_and_dumped_whole(tmp_path: Path) -> None:
    code = "from tests.pipeline.toys import Square\nclass Wide(Square):\n    width: int = 2\n"
    (tmp_path / "shapes.py").write_text(code)
    holder = Holder.model_validate(
        {"shape": {"use": "./shapes.py:Wide", "side": 3}}, context={"roots": (tmp_path,)}
    )
    assert holder.model_dump() == {"shape": {"use": "./shapes.py:Wide", "side": 3, "width": 2}}
    assert isinstance(holder.shape, Square)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("cup", "unknown target 'cup'; did you mean 'cpu'"),
        ({"use": "cpu"}, "is no Shape"),
        ({"use": "./gone.py:X"}, "no such file"),
        ({}, "'use' is missing; it names one of cpu"),
        (3, "valid dictionary"),
    ],
)
def test_bad_plug_ins_are_named(value: object, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"shape": value})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "code", ["import nowhere_at_all", "x = (", "1 / 0", "x = 1", "raise SystemExit(0)"]
)
def test_a_local_file_that_cannot_be_used(tmp_path: Path, code: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(PluginError, match=r"bad\.py"):
        registry.load(registry.STAGES, "./bad.py:Thing", Stage, (tmp_path,))


def install(root: Path, groups: dict[str, str], code: str) -> None:
    """A package as pip would leave it: a module and its metadata."""
    (root / "outside.py").write_text(textwrap.dedent(code))
    info = root / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    lines = [f"[{group}]\n{line}\n" for group, line in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


def lifecycle(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from lifecycle.cli import main; "
    return subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main())", *args],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_stage_of_an_installed_package(tmp_path: Path) -> None:
    code = """
        from lifecycle.pipeline.artifact import Artifact
        from lifecycle.pipeline.stage import Stage

        class Greeting(Artifact):
            kind = "greeting"

        class Greet(Stage):
            \"\"\"Writes a greeting.\"\"\"
            produces = Greeting
            name: str
            \"\"\"Whom to greet.\"\"\"
            def run(self, ctx):
                (ctx.out / "text").write_text(f"hello {self.name}")
                return {"letters": len(self.name)}
    """
    install(tmp_path, {"lifecycle.stages": "greet = outside:Greet"}, code)
    (tmp_path / "r.yaml").write_text("stages:\n  hello: {use: greet, name: world}\n")
    done = lifecycle(tmp_path, "run", "r.yaml")
    assert done.returncode == 0, done.stderr
    assert "letters 5" in done.stdout
    assert "Whom to greet." in lifecycle(tmp_path, "stages", "greet").stdout


def test_two_packages_with_one_name(tmp_path: Path) -> None:
    install(tmp_path, {"lifecycle.stages": "merge = outside:Greet"}, "class Greet: pass")
    (tmp_path / "r.yaml").write_text("stages:\n  hello: {use: merge}\n")
    done = lifecycle(tmp_path, "run", "r.yaml")
    assert done.returncode == 2
    assert "two packages offer lifecycle.stages 'merge'" in done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nraise ValueError('hi')\n", "line 2: ValueError: hi"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
        ("def f(:\n", "SyntaxError: "),
    ],
)
def test_a_file_that_fails_is_blamed_at_its_line(tmp_path: Path, code: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(PluginError, match=rf"'\./mine\.py:X' cannot be imported: {words}"):
        registry.load(registry.STAGES, "./mine.py:X", Stage, [tmp_path])
