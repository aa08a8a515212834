"""The command-line arguments of `lifecycle serve` and `lifecycle chat`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lifecycle.commands.numbers import count, natural, quantity
from lifecycle.commands.output import Parser
from lifecycle.commands.providers import add_provider
from lifecycle.engines.native import KERNELS

KEY_VARIABLE = "LIFECYCLE_API_KEY"


def serve_parser() -> Parser:
    """Arguments of `lifecycle serve`."""
    parser = Parser(
        prog="lifecycle serve", description="Serve a bundle over HTTP with the OpenAI API."
    )
    _add_model(parser)
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call the model")
    parser.add_argument(
        "--adapter",
        action="append",
        type=adapter,
        default=[],
        metavar="NAME=FOLDER",
        help="LoRA adapter (a PEFT folder) that clients get by naming it as their model; may be "
        "given several times; an exported model must have adapter slots",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=natural, default=8000, help="0 takes a free one (%(default)s)"
    )
    _add_keys(parser)
    parser.add_argument(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help="file of the operator's keys, one a line, which may load and unload adapters too",
    )
    parser.add_argument(
        "--adapter-root",
        type=Path,
        metavar="DIR",
        help="folder that adapters may be loaded from while the server runs, by POST "
        "/v1/load_lora_adapter; needs --admin-key-file",
    )
    parser.add_argument(
        "--evict-adapters",
        action="store_true",
        help="let an adapter that is loaded take the place of the one loaded so that was asked for least "
        "recently, where no slot is free and nobody uses it",
    )
    parser.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web origin whose pages may call the server; may be given several times",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=count,
        default=8,
        metavar="N",
        help="requests that run together (%(default)s)",
    )
    parser.add_argument(
        "--max-queue",
        type=natural,
        metavar="N",
        help="requests that may wait; more are refused at once (four times --max-num-seqs)",
    )
    parser.add_argument(
        "--prefix-cache",
        type=natural,
        default=256,
        metavar="MIB",
        help="memory for keys and values of how prompts began, so that prompts that begin alike are "
        "computed once; 0 turns it off (%(default)s)",
    )
    parser.add_argument(
        "--kv-cache",
        type=count,
        metavar="MIB",
        help="memory for keys and values of running requests, one context at least; where it is full, the "
        "requests that came last wait and are computed anew (room for --max-num-seqs contexts)",
    )
    parser.add_argument(
        "--draft-tokens",
        type=natural,
        default=0,
        metavar="N",
        help="most tokens guessed per step from what a request's text holds already, for answers that "
        "quote; the answers are as good (%(default)s)",
    )
    parser.add_argument(
        "--allow-priority",
        action="store_true",
        help="let requests go before others by a negative priority; without it they can only step back",
    )
    parser.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a smaller model with the same tokenizer, named as the bundle is, which guesses up to --draft-tokens "
        "where the text holds nothing to guess from; the answers are as good",
    )
    parser.add_argument(
        "--packed-weights",
        type=Path,
        metavar="DIR",
        help="keep the weights here as ONNX Runtime's kernels want them, about twice the model's size: the server "
        "starts sooner, and servers of the same model, and its adapters, share their memory",
    )
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default="auto",
        help="whose kernels compute the model on a CPU: native are this project's, compiled once where they run; "
        "auto takes them where they are faster (%(default)s)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=quantity,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may take to end after SIGTERM (%(default)s)",
    )
    return parser


def chat_parser() -> Parser:
    """Arguments of `lifecycle chat`."""
    parser = Parser(prog="lifecycle chat", description="Talk to a bundle in the terminal.")
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--temperature", type=quantity, help="0 is greedy (the bundle's default)")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    parser.set_defaults(
        adapter=[],
        served_model_name=None,
        max_num_seqs=1,
        max_queue=0,
        prefix_cache=64,
        kv_cache=None,
        draft_tokens=0,
        draft_model=None,
        packed_weights=None,
        kernels="auto",
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        help="bundle folder; or the name of a run or recipe, whose last bundle is taken; or NAME/STAGE, what "
        "that stage made last",
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="store to look the name up in")
    parser.add_argument("--engine", default="onnxruntime", help="what runs it (%(default)s)")
    add_provider(parser)
    parser.add_argument(
        "--max-model-len", type=count, metavar="TOKENS", help="context of one request"
    )
    parser.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="threads inside an operator (all cores)",
    )


def _add_keys(parser: argparse.ArgumentParser) -> None:
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that clients must send; other users of the machine can see it in the list of "
        f"processes, so --api-key-file or the variable {KEY_VARIABLE} is safer",
    )
    keys.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file of accepted keys, one a line"
    )


def adapter(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER`."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FOLDER, as in sql=adapters/sql")
    return name, Path(folder)
