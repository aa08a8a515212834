"""The argument that names execution providers, of every command that opens an engine."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any, Protocol

from lifecycle.engines.providers import Provider, parse_provider


class _Arguments(Protocol):
    """A parser, or a group of its arguments."""

    def add_argument(self, *names: str, **how: Any) -> object: ...


def add_provider(parser: _Arguments) -> None:
    """`--provider`."""
    parser.add_argument(
        "--provider",
        action="append",
        type=_provider,
        dest="providers",
        metavar="NAME[:KEY=VALUE,...]",
        help="an execution provider of ONNX Runtime to run on, such as cuda or cuda:device_id=1; may be given several "
        "times, the preferred one first (those that the model was exported for)",
    )


def _provider(text: str) -> Provider:
    try:
        return parse_provider(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
