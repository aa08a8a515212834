"""`scheme: auto`: the best of several quantisations of a model that holds a bound on this host."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from lifecycle.errors import EngineError, GateError, StageError
from lifecycle.evaluation.front import Trial, best, holding, nearest, pareto_front
from lifecycle.evaluation.gates import METRICS, judge
from lifecycle.kinds import OnnxModel, Report, Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.files import write_atomic
from lifecycle.pipeline.stage import Context
from lifecycle.stages.candidates import Candidate, candidates_of
from lifecycle.stages.evaluate import Evaluate

if TYPE_CHECKING:
    from lifecycle.evaluation.speed import Speed
    from lifecycle.stages.quantize import Quantize

FILE = "search.json"
"""What was chosen, among what, with all that a clock has no part in."""

_CANDIDATE = "the candidate"


def search(stage: Quantize, ctx: Context) -> Metrics:
    """Build, measure and compare the candidates; `ctx.out` gets the chosen one.

    Candidates and their evaluations are artifacts of their own, cached as any other; speeds are
    measured anew whenever the search runs.

    Raises:
        GateError: none holds the bound; nothing is produced.
        StageError: the model is quantised already, or no candidate can be made.
    """
    from lifecycle.evaluation.speed import speeds_beside

    model = _checked_model(stage, ctx)
    left_out: dict[str, str] = {}
    made = dict(_made(stage, ctx, model, left_out))
    quality = dict(_quality(stage, ctx, made, left_out))
    made = {name: made[name] for name in quality}
    if not made:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise StageError(f"no candidate can be measured: {reasons}")
    ctx.progress.phase("timing")
    batch = stage.batch if stage.objective == "throughput" else 1
    speeds = speeds_beside(model, list(made.values()), batch, ctx.progress)
    trials = [
        Trial(name, quality[name] | _cost(artifact, model, speeds[artifact.digest]))
        for name, artifact in made.items()
    ]
    held = holding(trials, stage.bound)
    chosen = best(held, stage.bound, stage.objective) if held else None
    table = _table(stage, trials, chosen, left_out, batch)
    if chosen is None:
        raise GateError(_none_holds(stage, trials), {"search": table})
    ctx.progress.log(f"chosen: {chosen.name}")
    ctx.link(made[chosen.name].path)
    # By rename: a model that was chosen before may have brought a file of this name.
    write_atomic(ctx.out / FILE, _without_clock(table))
    return {
        **{name: chosen.metrics[name] for name in dict.fromkeys(["speed", "size", *stage.bound])},
        "chosen": chosen.name,
        "held": len(held),
        "candidates": len(trials),
        "search": table,
    }


def _checked_model(stage: Quantize, ctx: Context) -> OnnxModel:
    from lifecycle.engines.decoder import DecoderInfo

    model = ctx.input(stage.model)
    if not isinstance(model, OnnxModel):
        raise StageError(
            f"scheme: auto measures decoders, but '{stage.model}' is a graph of another kind: quantize "
            "it by each scheme, and compare"
        )
    scheme = DecoderInfo.load(model.path).scheme
    if scheme != "fp32":
        raise StageError(f"'{stage.model}' is quantised already ({scheme}); start from the export")
    assert stage.data is not None
    needs = [name for name in stage.bound if METRICS[name].measure == "accuracy"]
    if needs and isinstance(ctx.input(stage.data), Text):
        raise StageError(
            f"bound: '{needs[0]}' needs conversations, but '{stage.data}' is plain text, which asks "
            "no question: bound perplexity_ratio, kl or top1_agreement, or give conversations"
        )
    return model


def _made(
    stage: Quantize, ctx: Context, model: OnnxModel, left_out: dict[str, str]
) -> Iterator[tuple[str, OnnxModel]]:
    """The candidates that the store has or that can be made. Of the usual ones some are not for
    every model and target; what a recipe lists must be possible."""
    for candidate in candidates_of(stage):
        try:
            yield candidate.name, _build(ctx, candidate, model)
        except StageError as error:
            if stage.candidates is not None:
                raise StageError(f"candidate {candidate.name}: {error}") from error
            _leave_out(ctx, candidate.name, error, left_out)


def _build(ctx: Context, candidate: Candidate, model: OnnxModel) -> OnnxModel:
    if candidate.stage is None:
        return model
    return cast(OnnxModel, ctx.build(candidate.name, "quantize", candidate.stage))


def _leave_out(ctx: Context, name: str, error: Exception, left_out: dict[str, str]) -> None:
    left_out[name] = str(error)
    ctx.progress.log(f"{name} is left out: {error}")


def _quality(
    stage: Quantize, ctx: Context, made: Mapping[str, OnnxModel], left_out: dict[str, str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """What the evaluation of each candidate beside the float32 model gives."""
    needed = {METRICS[name].measure for name in stage.bound} - {"speed", "size"}
    evaluate = Evaluate.model_validate(
        {
            "model": _CANDIDATE,
            "reference": stage.model,
            "data": stage.data,
            "metrics": sorted({"perplexity", "agreement"} | needed),
            "max_samples": stage.eval_samples,
            "max_generated": stage.eval_samples,
            "max_length": stage.sample_length,
        }
    )
    for name, artifact in made.items():
        try:
            report = ctx.build(name, "evaluate", evaluate, {_CANDIDATE: artifact})
        except (StageError, EngineError) as error:
            _leave_out(ctx, name, error, left_out)
        else:
            yield name, cast(Report, report).content["metrics"]


def _cost(artifact: OnnxModel, model: OnnxModel, speed: Speed) -> dict[str, float]:
    from lifecycle.evaluation.measure import weigh

    return weigh([artifact, model]).metrics | {
        "tokens_per_second": float(f"{speed.tokens_per_second:.3g}"),
        "speed": float(f"{speed.ratio:.3g}"),
        "error": float(f"{speed.error:.2g}"),
    }


def _table(
    stage: Quantize,
    trials: Sequence[Trial],
    chosen: Trial | None,
    left_out: Mapping[str, str],
    batch: int,
) -> dict[str, Any]:
    """All that was found, for people and programs."""
    import onnxruntime

    from lifecycle.engines.limits import usable_cores

    front = pareto_front(trials, stage.bound, stage.objective)
    held = holding(trials, stage.bound)
    rows = [
        {
            "name": trial.name,
            **trial.metrics,
            "holds": trial in held,
            "on_front": trial in front,
            "chosen": trial is chosen,
        }
        for trial in trials
    ]
    return {
        "objective": stage.objective,
        "batch": batch,
        "bound": dict(stage.bound),
        "candidates": rows,
        "left_out": dict(left_out),
        "host": {
            "machine": platform.machine(),
            "cores": usable_cores(),
            "onnxruntime": onnxruntime.__version__,
        },
    }


def _without_clock(table: dict[str, Any]) -> bytes:
    """The table as JSON, the same bytes whenever the same candidate is chosen."""
    timed = {"tokens_per_second", "speed", "error", "on_front", "holds"}
    rows = [{k: v for k, v in row.items() if k not in timed} for row in table["candidates"]]
    kept = {name: table[name] for name in ("objective", "batch", "bound")}
    # Reasons name what a recipe calls its artifacts.
    kept |= {"format": 1, "candidates": rows, "left_out": list(table["left_out"])}
    text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _none_holds(stage: Quantize, trials: Sequence[Trial]) -> str:
    near = nearest(trials, stage.bound)
    bound = ", ".join(f"{name} {text}" for name, text in stage.bound.items())
    lines = [f"none of the {len(trials)} candidates holds the bound ({bound})"]
    for trial in trials:
        figures = ", ".join(
            f"{verdict.metric} is {verdict.measured!r}"
            + ("" if verdict.passed else f", bound {verdict.bound}")
            for verdict in judge(trial.metrics, stage.bound)
        )
        lines.append(f"  {trial.name}: {figures}" + (" (nearest)" if trial is near else ""))
    return "\n".join(lines)
