"""`lifecycle doctor`: what this machine and this installation can do."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from lifecycle import __version__
from lifecycle.commands.output import Parser, emit, say, table

DISTRIBUTION = "lifecycle-toolkit"
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
                    "asimd", "asimddp", "i8mm", "sve")  # fmt: skip
EXTRAS = {
    "train": "pre-training, fine-tuning, merging",
    "export": "ONNX export and quantisation",
    "serve": "the HTTP server",
    "data": "parquet files",
}


def main(argv: list[str]) -> int:
    """Print versions, cores, instruction sets, providers, accelerators and missing extras."""
    parser = Parser(prog="lifecycle doctor", description="What this machine can do.")
    parser.add_argument(
        "--build",
        action="store_true",
        help="compile the kernels for this processor, if they are not yet",
    )
    parser.add_json()
    args = parser.parse_args(argv)
    if args.build:
        from lifecycle.engines.native.library import kernels_for

        kernels_for("native")
    found = examine()
    if args.json:
        emit(found)
        return 0
    say(f"lifecycle {found['lifecycle']}, Python {found['python']}, {found['platform']}")
    memory = f"{found['memory_gib']} GiB memory" if found["memory_gib"] else "memory unknown"
    say(f"{found['cores']} usable cores, {memory}, {found['disk_free_gib']} GiB free here")
    say(f"instruction sets: {', '.join(found['instruction_sets']) or 'unknown'}")
    say(f"execution providers: {', '.join(found['execution_providers']) or 'none'}")
    kernels = found["kernels"]
    say(f"kernels of engines on the CPU: {kernels['used']} ({kernels['why']})")
    say(f"accelerators: {', '.join(found['accelerators']) or 'none'}")
    table(("package", "version"), [(n, v or "-") for n, v in found["packages"].items()])
    for extra, missing in found["missing_extras"].items():
        say(
            f"pip install '{DISTRIBUTION}[{extra}]' would add {EXTRAS[extra]} "
            f"(missing: {', '.join(missing)})"
        )
    return 0


def examine() -> dict[str, Any]:
    """All that `doctor` reports."""
    wanted = _requirements()
    packages = {name: _version(name) for names in wanted.values() for name in names}
    missing = {
        extra: [name for name in wanted.get(extra, []) if packages[name] is None]
        for extra in EXTRAS
    }
    from lifecycle.engines.limits import usable_cores

    return {
        "lifecycle": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "memory_gib": _memory(),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30),
        "instruction_sets": _instruction_sets(),
        "execution_providers": _providers(),
        "kernels": _kernels(),
        "accelerators": _accelerators(),
        "packages": packages,
        "missing_extras": {extra: names for extra, names in missing.items() if names},
    }


def _requirements() -> dict[str, list[str]]:
    """Names of the packages of the core ('') and of each extra."""
    from re import match, search

    found: dict[str, list[str]] = {"": []}
    for text in requires(DISTRIBUTION) or []:
        name = match(r"[\w.-]+", text)
        extra = search(r"extra == ['\"]([\w-]+)['\"]", text)
        group = extra[1] if extra else ""
        if name and name[0] != DISTRIBUTION and group in ("", *EXTRAS):
            found.setdefault(group, []).append(name[0])
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _instruction_sets() -> list[str]:
    from lifecycle.engines.native.library import instruction_sets

    flags = instruction_sets()
    return [name for name in INSTRUCTION_SETS if name in flags]


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _kernels() -> dict[str, str | bool]:
    """Whose kernels an engine takes by itself, and why."""
    from lifecycle.engines.native.library import is_compiled, library_path, why_not

    reason = why_not()
    compiled = reason is None and is_compiled()
    state = f"compiled, {library_path()}" if compiled else "compiled by the first engine or --build"
    return {
        "used": "onnxruntime" if reason else "native",
        "why": reason or state,
        "compiled": compiled,
    }


def _accelerators() -> list[str]:
    try:
        import torch
    except ModuleNotFoundError:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(i) for i in range(count)]
