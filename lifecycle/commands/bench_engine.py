"""`lifecycle bench engine`: an engine under load, without HTTP."""

from __future__ import annotations

import platform
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from lifecycle import __version__
from lifecycle.benchmarking import memory
from lifecycle.benchmarking.report import Point, Report, measure_point
from lifecycle.benchmarking.workload import Workload
from lifecycle.commands import bench_tables
from lifecycle.commands.bench_arguments import check, engine_parser
from lifecycle.commands.bench_plan import Plan, make_plan
from lifecycle.commands.output import emit, progress_display, say, table
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.decoder import FILE as DECODER
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.limits import usable_cores
from lifecycle.errors import EngineError, InterruptedRun, RecipeError
from lifecycle.pipeline import registry
from lifecycle.pipeline.progress import DRAW_EVERY, Display, Stop
from lifecycle.pipeline.runs import find_folder


def main(argv: list[str]) -> int:
    """Measure an engine and show what was found."""
    args = engine_parser().parse_args(argv)
    check(args)
    engine_class = registry.load(registry.ENGINES, args.engine, Engine)
    folder = _folder(args)
    info = DecoderInfo.load(folder) if (folder / DECODER).is_file() else None
    plan = make_plan(args, info.max_position_embeddings if info is not None else None)
    if plan.note():
        sys.stderr.write(f"warning: {plan.note()}\n")
    options = _options(plan)
    display = progress_display(args.json)
    try:
        with closing(engine_class.open(folder, options)) as engine:
            workloads = plan.workloads(engine.vocab_size)
            report = Report(
                model=_about_model(args.model, folder, info),
                engine=_about_engine(args.engine, options, engine),
                workload=plan.to_json(),
                environment=_environment(),
            )
            error = _measure(engine, workloads, report, display)
    finally:
        display.close()
    _show(report, plan, args)
    if error is not None:
        raise error
    return 0


def _folder(args: Namespace) -> Path:
    """The folder of MODEL."""
    folder = find_folder(args.model, args.store)
    if args.engine == "onnxruntime" and not (folder / DECODER).is_file():
        way = (
            "measure it as it is with --engine pytorch, or export it with a recipe (use: export)"
            if (folder / "config.json").is_file()
            else "name a bundle of a language model, or a folder that `use: export` made"
        )
        raise RecipeError(f"MODEL {folder} is no exported decoder, it has no {DECODER}: {way}")
    return folder


def _options(plan: Plan) -> EngineOptions:
    args, draft = plan.args, plan.args.draft_model
    return EngineOptions(
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        threads=args.threads or usable_cores(),
        prefill_chunk=args.prefill_chunk,
        prefix_cache_bytes=args.prefix_cache << 20,
        kv_cache_bytes=args.kv_cache << 20 or None,
        draft_tokens=args.draft_tokens,
        draft_model=None if draft is None else find_folder(draft, args.store),
        packed_weights=args.packed_weights,
        kernels=args.kernels,
        providers=args.providers,
    )


def _about_model(given: str, folder: Path, info: DecoderInfo | None) -> dict[str, Any]:
    known = ("architecture", "scheme", "kv_dtype")
    # Folders in a store are named by what is in them.
    name = folder.resolve().name if Path(given).is_dir() else given
    about = {key: None if info is None else getattr(info, key) for key in known}
    return {"name": name, "path": str(folder), **about}


def _about_engine(name: str, options: EngineOptions, engine: Engine) -> dict[str, Any]:
    about = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(options).items()}
    return {"name": name, **about, "kernels": engine.kernels, "providers": engine.providers}


def _environment() -> dict[str, Any]:
    return {
        "lifecycle": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
    }


def _measure(
    engine: Engine, workloads: Sequence[Workload], report: Report, display: Display
) -> EngineError | InterruptedRun | None:
    """Fill `report`; the error is what ended it early."""
    base = memory.resident()
    with _interruptible(display) as stop:
        for workload in workloads:
            began = time.monotonic()
            use = ", ".join(filter(None, (workload.lengths, workload.arrivals)))
            display.started(workload.label, use)
            status, shown, error = "done", "", None
            try:
                point = _point(engine, workload, base, report, display, stop)
            except EngineError as failure:
                point, status, error, report.status = None, "failed", failure, "failed"
            if point is not None:
                report.points.append(point)
                shown = f"{point.metrics.output_throughput:,.1f} output tokens/s"
            if stop.requested:
                status, report.status = "stopped", "interrupted"
                error = InterruptedRun("interrupted: what is shown had been measured by then")
            seconds = time.monotonic() - began
            display.ended(workload.label, use, status, seconds, shown)
            if error is not None:
                return error
    return None


def _point(
    engine: Engine,
    workload: Workload,
    base: int | None,
    report: Report,
    display: Display,
    stop: Stop,
) -> Point | None:
    drawn = 0.0

    def on_done(done: int, total: int) -> None:
        nonlocal drawn
        # The loop that is timed waits for it.
        if (now := time.monotonic()) - drawn >= DRAW_EVERY:
            drawn = now
            display.advance(workload.label, "requests", done, total, {})

    return measure_point(
        engine,
        workload,
        base_rss=base,
        bounds=report.workload["goodput"],
        should_stop=lambda: stop.requested,
        on_done=on_done,
    )


@contextmanager
def _interruptible(display: Display) -> Generator[Stop]:
    """The first Ctrl-C lets the step end, the second one ends at once."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        display.log("", "stopping after this step; once more to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _show(report: Report, plan: Plan, args: Namespace) -> None:
    if args.out is not None:
        from lifecycle.commands.bench_page import render

        try:
            args.out.write_text(render(report), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--out {args.out} cannot be written: {error.strerror}") from error
    if args.json:
        emit(report.to_json())
        return
    if report.points:
        table(*bench_tables.throughput(report))
        table(*bench_tables.latencies(report))
    if plan.note():
        say(plan.note())
    if args.out is not None:
        say(f"{args.out}")
