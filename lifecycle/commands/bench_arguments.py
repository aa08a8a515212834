"""The command-line arguments of `lifecycle bench engine`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lifecycle.benchmarking.metrics import GOODPUT_KEYS
from lifecycle.commands.numbers import count, natural, number, positive
from lifecycle.commands.output import Parser
from lifecycle.commands.providers import add_provider
from lifecycle.engines.native import KERNELS
from lifecycle.errors import RecipeError
from lifecycle.pipeline.suggest import did_you_mean

BATCH, PROMPT, OUTPUT = (1, 2, 4, 8), (32, 128), (64,)
"""What is swept over by default."""
_EPILOG = """\
TTFT: time to first token, from the arrival. TPOT: time per output token after the first. ITL: gaps
between tokens. E2E: from the arrival to the last token. --json prints one object; its keys are in
docs/benchmarking.md. Ctrl-C ends with what has been measured so far, and exit code 130.
"""


def engine_parser() -> Parser:
    """Arguments of `lifecycle bench engine`."""
    parser = Parser(
        prog="lifecycle bench engine",
        description="Measure throughput, latency and memory of an engine in this process, without "
        "HTTP: a sweep over batch and lengths, random arrivals (--rate), or a trace (--trace).",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="bundle or exported decoder: a folder; or the name of a run or "
        "recipe, whose last bundle is taken; or NAME/STAGE, what that stage made last"
    )  # fmt: skip
    parser.add_store()
    _add_workload(parser)
    _add_engine(parser)
    parser.add_argument(
        "--goodput",
        nargs="+",
        type=_bound,
        metavar="KEY:MS",
        help="count the requests within these bounds: ttft, tpot, e2el, in milliseconds",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write a page with plots")
    parser.add_json()
    return parser


def _add_workload(parser: Parser) -> None:
    group = parser.add_argument_group("workload")
    for flag, default, text in (
        ("--batch", BATCH, "requests in flight at a time"),
        ("--prompt", PROMPT, "tokens of a prompt"),
        ("--output", OUTPUT, "tokens to generate"),
    ):
        shown = " ".join(map(str, default))
        group.add_argument(
            flag, nargs="+", type=count, metavar="N", help=f"{text}; all combinations ({shown})"
        )
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument(
        "--rate",
        type=positive("arrivals per second"),
        metavar="R",
        help="requests come at random, R a second on average, instead of a batch",
    )
    kinds.add_argument(
        "--trace", type=Path, metavar="FILE", help="requests of a trace, JSONL as Mooncake's"
    )
    group.add_argument(
        "--speed", type=positive("a factor"), metavar="X", help="trace: play it X times as fast (1)"
    )
    group.add_argument(
        "--scale", type=positive("a factor"), metavar="S", help="trace: divide all lengths by S (1)"
    )
    group.add_argument(
        "--requests",
        type=count,
        metavar="N",
        help="requests per point (two rounds of the batch and at least 8; with --rate four rounds "
        "of --max-num-seqs); trace: the first N (all)",
    )
    group.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of tokens and arrivals (%(default)s)"
    )


def _add_engine(parser: Parser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", default="onnxruntime", metavar="NAME", help="(%(default)s)")
    group.add_argument(
        "--max-num-seqs", type=count, metavar="N", help="slots (the largest batch, else 8)"
    )
    group.add_argument(
        "--max-model-len", type=count, metavar="TOKENS", help="context (what the workload needs)"
    )
    group.add_argument(
        "--threads", type=count, metavar="N", help="threads inside an operator (all cores)"
    )
    group.add_argument(
        "--prefix-cache", type=natural, default=0, metavar="MIB",
        help="memory for what prompts that begin alike share; 0 turns it off (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--prefill-chunk", type=count, default=128, metavar="TOKENS",
        help="prompt tokens computed in one step (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache", type=natural, default=0, metavar="MIB",
        help="memory for keys and values of requests; 0 is room for all slots (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--draft-tokens", type=natural, default=0, metavar="N",
        help="most tokens guessed per step from what a text holds already (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--draft-model", metavar="MODEL",
        help="a smaller model with the same tokenizer that guesses up to --draft-tokens",
    )  # fmt: skip
    group.add_argument(
        "--packed-weights", type=Path, metavar="DIR",
        help="keep the weights here as ONNX Runtime's kernels want them, and map them from there",
    )  # fmt: skip
    group.add_argument(
        "--kernels", choices=KERNELS, default="auto",
        help="whose kernels compute: native are this project's, auto the faster ones (%(default)s)",
    )  # fmt: skip
    add_provider(group)


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, and fill in the sweep.

    Raises:
        RecipeError: names the flags and the way out.
    """
    is_sweep = args.rate is None and args.trace is None
    if args.trace is None:
        for name in ("speed", "scale"):
            if getattr(args, name) is not None:
                raise RecipeError(f"--{name} goes with --trace: name a trace, or leave it out")
    else:
        for name in ("prompt", "output"):
            if getattr(args, name) is not None:
                raise RecipeError(
                    f"--{name} does not go with --trace, which has lengths of its own: leave it out, "
                    "or divide them with --scale"
                )
    if args.batch is not None and not is_sweep:
        other = "--trace" if args.rate is None else "--rate"
        raise RecipeError(
            f"--batch does not go with {other}, where requests come at their own times: leave it "
            "out, and set the slots with --max-num-seqs"
        )
    args.batch, args.prompt, args.output = (
        sorted(set(given or default))
        for given, default in ((args.batch, BATCH), (args.prompt, PROMPT), (args.output, OUTPUT))
    )
    if is_sweep and args.requests is not None and args.requests < max(args.batch):
        raise RecipeError(
            f"--requests {args.requests} is less than --batch {max(args.batch)}: give at least as "
            "many, or a smaller batch"
        )
    _check_out(args.out)


def _check_out(out: Path | None) -> None:
    """Find out before the measurement, not after it."""
    if out is None:
        return
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder: name a file in it, such as {out}/bench.html")
    if not out.parent.is_dir():
        raise RecipeError(f"--out {out}: there is no folder {out.parent}; make it first")


def _bound(text: str) -> tuple[str, float]:
    """`KEY:MS`."""
    key, _, limit = text.partition(":")
    if key not in GOODPUT_KEYS:
        raise argparse.ArgumentTypeError(
            f"unknown key {key!r}{did_you_mean(key, GOODPUT_KEYS)}; give KEY:MS with a key of "
            + ", ".join(GOODPUT_KEYS)
        )
    value = number(limit)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give milliseconds above 0, as in {key}:200")
    return key, value
