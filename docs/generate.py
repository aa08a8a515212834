"""Write `docs/reference/` from the code: `make docs`. A test says when it is stale."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from lifecycle.cli import COMMANDS, main, usage
from lifecycle.commands.bench import BENCHMARKS
from lifecycle.commands.stages import default, describe
from lifecycle.graph.targets import Target
from lifecycle.pipeline import registry
from lifecycle.pipeline.stage import Stage
from lifecycle.training.adapters import Adapter

NOTE = "<!-- Written by docs/generate.py; edit the docstrings instead. -->\n"


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    return {
        "stages.md": stages(),
        "architectures.md": architectures(),
        "commands.md": commands(),
    }


def stages() -> str:
    """Every stage, adapter and target with its settings."""
    parts = [NOTE, "# Stages and their settings\n"]
    for name in registry.names(registry.STAGES):
        cls = registry.load(registry.STAGES, name, Stage)
        parts += [f"## {name}\n", f"Makes: {cls.produces.kind}.\n", _doc(cls)]
        rows = [
            (s["name"], s["type"], "required" if s["required"] else _code(s["default"]), s["doc"])
            for s in describe(cls)
        ]
        parts.append(_table(("setting", "type", "default", "meaning"), rows))
    for title, group, base in (
        ("Adapters", registry.ADAPTERS, Adapter),
        ("Targets", registry.TARGETS, Target),
    ):
        parts.append(f"# {title}\n")
        for name in registry.names(group):
            cls = registry.load(group, name, base)
            parts += [f"## {name}\n", _doc(cls)]
            fields = {k: v for k, v in cls.model_fields.items() if k != "use"}
            if fields:
                rows = [(k, _code(v.default), v.description or "") for k, v in fields.items()]
                parts.append(_table(("setting", "default", "meaning"), rows))
    return "\n".join(parts)


def architectures() -> str:
    """Every decoder that `export` knows."""
    intro = (
        "`export` and `quantize` take every one of these. Tests hold a small model of each, with "
        "random weights, to the logits of PyTorch: within 1e-4 in float32 when a text is fed at "
        "once, in chunks, beside others at other speeds, and after a part of it was taken back; "
        "and within the rounding of `int8-rowwise` and `int4` when it is quantised; and with two LoRA "
        "adapters in slots beside a text without to those of PEFT.\n"
    )
    rows = [
        (
            _code(name),
            _doc(read).strip(),
            "yes",
            "yes",
            "yes",
            # Updates of experts are no LoRA of linear layers to PEFT.
            "attention" if read.__module__.endswith(".mixtures") else "yes",
        )
        for name in registry.names(registry.ARCHITECTURES)
        for read in [registry.load_function(registry.ARCHITECTURES, name)]
    ]
    headings = ("`model_type`", "what it is", "exported", "parity", "quantised", "LoRA slots")
    return "\n".join([NOTE, "# Architectures of decoders\n", intro, _table(headings, rows)])


def commands() -> str:
    """What every command's `--help` prints."""
    parts = [NOTE, "# Commands\n", f"```\n{usage()}\n```\n"]
    os.environ["COLUMNS"] = "96"
    for name in COMMANDS:
        parts.append(_help(name))
        if name == "bench":
            parts += [_help(name, benchmark) for benchmark in BENCHMARKS]
    return "\n".join(parts)


def _help(*command: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    title = " ".join(("lifecycle", *command))
    return f"## {title}\n\n```\n{text.getvalue().rstrip()}\n```\n"


def _doc(cls: Callable[..., object]) -> str:
    return (inspect.getdoc(cls) or "") + "\n"


def _code(value: object) -> str:
    return "" if value is None else f"`{default(value)}`"


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    cells = ([c.replace("|", "\\|").replace("\n", " ") for c in line] for line in lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


if __name__ == "__main__":
    folder = Path(__file__).with_name("reference")
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{folder / name}\n")
