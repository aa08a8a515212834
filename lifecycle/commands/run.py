"""`lifecycle run` and `lifecycle plan`."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from lifecycle.commands.front import show as show_searches
from lifecycle.commands.output import Parser, emit, progress_display, say, table
from lifecycle.engines.decoder import FILE as DECODER
from lifecycle.errors import InterruptedRun, LifecycleError
from lifecycle.pipeline.plan import plan as plan_recipe
from lifecycle.pipeline.progress import brief
from lifecycle.pipeline.recipe import Recipe, load
from lifecycle.pipeline.runner import Runner, continuation
from lifecycle.pipeline.runs import Run
from lifecycle.pipeline.store import Store


def _parser(command: str, description: str) -> Parser:
    parser = Parser(prog=f"lifecycle {command}", description=description)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a shipped recipe's name")
    parser.add_argument(
        "overrides",
        metavar="STAGE.FIELD=VALUE",
        nargs="*",
        # Without it argparse of Python before 3.13 would call them required.
        default=[],
        help="settings to use instead",
    )
    parser.add_argument("--until", metavar="STAGE", help="only this stage and what it needs")
    parser.add_store()
    parser.add_json()
    return parser


def run(argv: list[str]) -> int:
    """Run a recipe."""
    parser = _parser("run", "Run a recipe. What is cached is not run again.")
    parser.add_argument(
        "--force", metavar="STAGE", action="append", default=[], help="run it though it is cached"
    )
    args = parser.parse_intermixed_args(argv)
    _set_thread_libraries()
    try:
        recipe = load(args.recipe, args.overrides)
        store = Store.open(args.store)
        display = progress_display(args.json)
        try:
            runner = Runner(store, display)
            result, error = runner.run(recipe, args.overrides, args.until, args.force)
        finally:
            display.close()
    except LifecycleError as failure:
        if args.json:
            emit({"run": None, "recipe": args.recipe, "status": "failed", "stages": {}})
        raise failure
    if args.json:
        emit(result.result())
    else:
        _summary(result, store, args)
    if error is not None:
        _explain(result, error, recipe, args)
        return error.exit_code if isinstance(error, InterruptedRun) else 1
    return 0


def _set_thread_libraries() -> None:
    """Choose how the libraries that PyTorch computes with behave; they read it when loaded.

    OpenMP's threads give their core up soon when they wait: libgomp spins for about a millisecond
    by default, so on a machine with other work to do each thread keeps the core that the others
    wait for. And MKL gives the same bits on every run with the same number of threads, which it
    promises in this mode only.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("MKL_CBWR", "AUTO")


def _summary(run: Run, store: Store, args: Namespace) -> None:
    rows = [
        (
            name,
            stage.use,
            stage.status,
            f"{stage.seconds:.1f}" if stage.status in ("done", "failed") else "",
            (stage.digest or "")[:12],
            brief(stage.metrics),
        )
        for name, stage in run.stages.items()
    ]
    table(("stage", "use", "status", "seconds", "artifact", "metrics"), rows)
    show_searches(run)
    took = (run.ended or run.started) - run.started
    say(f"run {run.run} of '{run.recipe}': {run.status} in {took:.1f} s; store {store.root}")
    bundles = [s.path for s in run.stages.values() if s.kind == "bundle" and s.path]
    if run.status != "ok" or not bundles:
        return
    # It is the last one that is served.
    if (Path(bundles[-1]) / DECODER).is_file():
        place = ["--store", str(args.store)] if args.store else []
        say(f"serve it with: {shlex.join(['lifecycle', 'serve', run.recipe, *place])}")
    else:
        say(f"bundle: {bundles[-1]}")


def _explain(run: Run, error: LifecycleError, recipe: Recipe, args: Namespace) -> None:
    name = next((n for n, s in run.stages.items() if s.status == "failed"), "")
    options = ["--until", args.until] if args.until else []
    options += ["--store", str(args.store)] if args.store else []
    lines = [
        f"error: {name}: {error}",
        f"finished stages are kept; go on with: {continuation(recipe, args.overrides, options)}",
    ]
    sys.stderr.write("\n".join(lines) + "\n")


def plan(argv: list[str]) -> int:
    """Show what a run would do."""
    args = _parser(
        "plan", "Show which stages are cached and which would run, and why."
    ).parse_intermixed_args(argv)
    recipe = load(args.recipe, args.overrides)
    planned = plan_recipe(recipe, Store.look(args.store), args.until)
    if args.json:
        emit({"stages": {name: asdict(item) for name, item in planned.items()}})
        return 0
    rows = [
        (name, recipe.entries[name].use, item.status, "; ".join(item.because))
        for name, item in planned.items()
    ]
    table(("stage", "use", "status", "because"), rows)
    return 0
