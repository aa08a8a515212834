"""`lifecycle runs`: what was run, with what, and what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lifecycle.commands.front import show as show_searches
from lifecycle.commands.output import Parser, emit, say, table
from lifecycle.errors import RecipeError
from lifecycle.pipeline import runs
from lifecycle.pipeline.progress import brief
from lifecycle.pipeline.runs import Run
from lifecycle.pipeline.store import Store


def main(argv: list[str]) -> int:
    """List the runs, show one, compare two."""
    parser = Parser(prog="lifecycle runs", description="Past runs: list, show one, compare two.")
    parser.add_argument("action", nargs="?", choices=("list", "show", "compare"), default="list")
    parser.add_argument("names", nargs="*", help="ids of runs (or the start of one), or recipes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="show: write a page with curves")
    parser.add_store()
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    wanted = {"list": 0, "show": 1, "compare": 2}[args.action]
    if len(args.names) != wanted:
        parser.error(f"{args.action} takes {wanted} name{'s' if wanted != 1 else ''}")
    if args.html is not None and args.action != "show":
        parser.error("--html goes with show")
    store = Store.look(args.store).require()
    if args.action == "list":
        return _list(store, args.json)
    found = [runs.find(store, name) for name in args.names]
    if args.html is not None:
        return _page(store, found[0], args.html, args.json)
    if args.action == "show":
        return _show(store, found[0], args.json)
    return _compare(store, found[0], found[1], args.json)


def _list(store: Store, as_json: bool) -> int:
    found = list(runs.newest_first(store))
    if as_json:
        keys = ("run", "recipe", "status", "started", "ended")
        emit({"runs": [{k: v for k, v in r.to_json().items() if k in keys} for r in found]})
        return 0
    rows = [(r.run, r.recipe, r.status, _when(r.started), _took(r), _counts(r)) for r in found]
    table(("run", "recipe", "status", "started", "took", "stages"), rows)
    return 0


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _took(run: Run) -> str:
    return f"{run.ended - run.started:.1f} s" if run.ended else ""


def _counts(run: Run) -> str:
    states = [stage.status for stage in run.stages.values()]
    return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))


def _actions(store: Store, run: Run) -> dict[str, dict[str, Any]]:
    """Settings of every stage of a run, from the recipe as it was resolved."""
    path = runs.folder(store, run.run) / "recipe.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["stages"]
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def _show(store: Store, run: Run, as_json: bool) -> int:
    if as_json:
        emit(run.to_json() | {"settings": _actions(store, run)})
        return 0
    say(f"run {run.run} of '{run.recipe}' ({run.source}): {run.status}, {_when(run.started)}")
    if run.overrides:
        say("with " + " ".join(run.overrides))
    rows = [
        (
            name,
            stage.use,
            stage.status,
            ", ".join(stage.inputs.values()),
            (stage.digest or "")[:12],
            brief(stage.metrics, limit=6),
        )
        for name, stage in run.stages.items()
    ]
    table(("stage", "use", "status", "from", "artifact", "metrics"), rows)
    show_searches(run)
    for name, stage in run.stages.items():
        if stage.error:
            say(f"{name}: {stage.error}")
    say(f"metrics over time, logs, resolved recipe: {runs.folder(store, run.run)}")
    return 0


def _page(store: Store, run: Run, target: Path, as_json: bool) -> int:
    from lifecycle.commands.page import render

    try:
        target.write_text(render(store, run), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot be written: {error.strerror}", file=target) from error
    emit({"path": str(target)}) if as_json else say(f"{target}")
    return 0


def _compare(store: Store, first: Run, second: Run, as_json: bool) -> int:
    settings = _differences(_actions(store, first), _actions(store, second))
    metrics = _differences(
        {name: stage.metrics for name, stage in first.stages.items()},
        {name: stage.metrics for name, stage in second.stages.items()},
    )
    if as_json:
        found = {"settings": settings, "metrics": metrics}
        emit({"runs": [first.run, second.run], **found})
        return 0
    for title, rows in (("settings", settings), ("metrics", metrics)):
        say(f"{title} that differ:" if rows else f"no {title} differ")
        if rows:
            shown = [(r["name"], _short(r["first"]), _short(r["second"])) for r in rows]
            table(("", first.run, second.run), shown)
    return 0


def _short(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)[:80]


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """Values that are not the same, by dotted name."""
    a, b = _flat(first), _flat(second)
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    return [{"name": name, "first": a.get(name), "second": b.get(name)} for name in names]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, part in value.items():
        found |= _flat(part, f"{prefix}.{key}" if prefix else str(key))
    return found
