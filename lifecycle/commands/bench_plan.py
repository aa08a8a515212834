"""From the arguments of `lifecycle bench engine` to workloads that fit into a context."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from itertools import product
from typing import Any

from lifecycle.benchmarking.trace import Fitted, fit, read_trace, scale_for, trace_workload
from lifecycle.benchmarking.workload import Workload, closed_loop, open_loop
from lifecycle.errors import RecipeError

_SLOTS = 8
"""Of an open loop, unless it is said."""
_FEWEST_REQUESTS = 8
"""Of a point of a sweep, unless it is said."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be measured, and what an engine needs for it."""

    args: Namespace
    max_num_seqs: int
    max_model_len: int
    trace: Fitted | None = None
    context: int | None = None
    """Tokens that a request of the trace had to fit into."""

    def workloads(self, vocab_size: int) -> list[Workload]:
        """The points, the smallest first."""
        args = self.args
        common = {"vocab_size": vocab_size, "seed": args.seed}
        if self.trace is not None:
            return [
                trace_workload(
                    self.trace.entries,
                    scale=args.scale or 1.0,
                    speed=args.speed or 1.0,
                    num_slots=self.max_num_seqs,
                    **common,
                )
            ]
        lengths: list[tuple[int, int]] = list(product(args.prompt, args.output))
        if args.rate is not None:
            requests = args.requests or 4 * self.max_num_seqs
            slots = self.max_num_seqs
            return [
                open_loop(prompt, output, args.rate, requests, num_slots=slots, **common)
                for prompt, output in lengths
            ]
        return [
            closed_loop(*point, batch, args.requests or max(2 * batch, _FEWEST_REQUESTS), **common)
            for point in lengths
            for batch in args.batch
        ]

    def to_json(self) -> dict[str, Any]:
        """`workload` of the report."""
        args = self.args
        kind = "closed-loop" if args.rate is None else "poisson"
        found: dict[str, Any] = {
            "kind": kind if self.trace is None else "trace",
            "seed": args.seed,
            "goodput": dict(args.goodput) if args.goodput else None,
            "trace": None,
        }
        if self.trace is not None:
            found["trace"] = {
                "path": str(args.trace),
                "speed": args.speed or 1.0,
                "scale": args.scale or 1.0,
                "requests": len(self.trace.entries),
                "skipped": self.trace.skipped,
            }
        return found

    def note(self) -> str:
        """What a reader must know of a trace that was left out; empty if nothing was."""
        if self.trace is None or self.context is None or not self.trace.skipped:
            return ""
        total = len(self.trace.entries) + self.trace.skipped
        return (
            f"{self.trace.skipped} of {total} requests of the trace do not fit into "
            f"{self.context} tokens and are left out; "
            f"--scale {scale_for(self.trace.longest, self.context)} makes all fit"
        )


def make_plan(args: Namespace, model_limit: int | None) -> Plan:
    """Read the trace if there is one, and see what fits.

    Args:
        model_limit: tokens of context that the model knows; None if that is not known yet.

    Raises:
        RecipeError: what is asked for does not fit.
        DataError: the trace cannot be read.
    """
    limit = _limit(args, model_limit)
    where = (
        f"--max-model-len {args.max_model_len}"
        if args.max_model_len is not None
        else f"the model's context of {limit}"
    )
    if args.trace is not None:
        return _trace_plan(args, limit, where)
    prompt, output = max(args.prompt), max(args.output)
    if limit is not None and prompt + output > limit:
        raise RecipeError(
            f"--prompt {prompt} and --output {output} take {prompt + output} tokens, more than "
            f"{where}: give less"
        )
    slots = max(args.batch) if args.rate is None else _SLOTS
    return Plan(args, args.max_num_seqs or slots, args.max_model_len or prompt + output)


def _trace_plan(args: Namespace, limit: int | None, where: str) -> Plan:
    scale = args.scale or 1.0
    trace = fit(read_trace(args.trace, args.requests), scale, limit)
    if not trace.entries:
        assert limit is not None
        raise RecipeError(
            f"--trace {args.trace}: none of {trace.skipped} requests fits into {where}; divide "
            f"their lengths with --scale {scale_for(trace.longest, limit)}"
        )
    slots, length = args.max_num_seqs or _SLOTS, args.max_model_len or trace.needed
    return Plan(args, slots, length, trace, limit)


def _limit(args: Namespace, model_limit: int | None) -> int | None:
    wanted = args.max_model_len
    if wanted is not None and model_limit is not None and wanted > model_limit:
        raise RecipeError(
            f"--max-model-len {wanted} is more than the model's context of {model_limit} tokens: "
            "give that or less"
        )
    return model_limit if wanted is None else wanted
