"""`lifecycle bench`: what can be measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from lifecycle.commands.output import say
from lifecycle.pipeline.suggest import did_you_mean

BENCHMARKS = {
    "engine": (
        "lifecycle.commands.bench_engine:main",
        "throughput, latency and memory of an engine, in this process",
    ),
}


def usage() -> str:
    """What `lifecycle bench --help` prints."""
    lines = [f"  {name:<9} {text}" for name, (_, text) in BENCHMARKS.items()]
    return "\n".join(
        [
            "usage: lifecycle bench BENCHMARK [ARGUMENT ...]",
            "",
            *lines,
            "",
            "lifecycle bench BENCHMARK --help tells more",
        ]
    )


def main(argv: list[str]) -> int:
    """Run a benchmark."""
    if not argv:
        say(usage())
        return 2
    name, *rest = argv
    if name in ("-h", "--help"):
        say(usage())
        raise SystemExit(0)
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS)
        sys.stderr.write(f"error: no benchmark '{name}'{hint}\n\n{usage()}\n")
        return 2
    module, _, function = BENCHMARKS[name][0].partition(":")
    benchmark: Callable[[list[str]], int] = getattr(import_module(module), function)
    return benchmark(rest)
