"""`lifecycle inspect`: what an ONNX graph is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from lifecycle.commands.output import Parser, emit, say, table
from lifecycle.graph.inspect import Inspection, Matrix, Port, inspect_graph
from lifecycle.graph.work import CONVOLUTIONS, LOOPS, RECURRENT, TRANSPOSED
from lifecycle.pipeline.runs import find_folder


def main(argv: list[str]) -> int:
    """Print inputs, operators, weights, precision and estimated work of a graph."""
    parser = Parser(
        prog="lifecycle inspect",
        description="What an ONNX graph is made of. Its weights are not read.",
    )
    parser.add_argument(
        "model",
        help="an .onnx file or a folder with model.onnx; or the name of a run or recipe, whose last bundle "
        "is taken; or NAME/STAGE, what that stage made last",
    )
    parser.add_argument(
        "--all", action="store_true", help="one line per matrix, also of layers that are alike"
    )
    parser.add_store()
    parser.add_json()
    args = parser.parse_args(argv)
    path = Path(args.model)
    found = inspect_graph(path if path.exists() else find_folder(args.model, args.store))
    if args.json:
        emit(asdict(found))
        return 0
    _show(found, found.matrices if args.all else _grouped(found.matrices))
    return 0


def _show(found: Inspection, matrices: Iterable[Matrix]) -> None:
    opsets = ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in found.opsets.items())
    say(f"{found.file}: opsets {opsets}")
    ports = [("input", port) for port in found.inputs] + [("output", p) for p in found.outputs]
    table(("", "name", "type", "shape"), _port_rows(ports))
    table(("operator", "nodes"), [(name, str(count)) for name, count in found.operators.items()])
    table(
        ("matrices", "operator", "shape", "precision", "parameters", "bytes"),
        [
            (
                matrix.name,
                matrix.operator.rpartition(".")[2],
                "×".join(map(str, matrix.shape)),
                matrix.precision,
                f"{matrix.parameters:,}",
                f"{matrix.bytes:,}",
            )
            for matrix in matrices
        ],
    )
    bits = 8 * found.bytes / found.parameters if found.parameters else 0
    say(
        f"{found.parameters:,} parameters, {found.bytes:,} bytes ({bits:.2f} bits each); "
        f"{2 * found.multiply_adds:,} operations per row{_exceptions(found)}"
    )
    if found.others:
        say(f"{found.others:,} values in other constants: norms, biases, scales, tables, shapes")
    if found.attention:
        say(f"attention: {2 * found.attention:,} operations per row and position it reads")
    if found.attention is None:
        say("attention: operations not known, its shapes are not")
    if found.total:
        say(f"one run: {' + '.join(_terms(found.total))} operations")


def _terms(total: dict[str, int]) -> Iterable[str]:
    return (f"{2 * factor:,}" + (f"·{names}" if names else "") for names, factor in total.items())


def _exceptions(found: Inspection) -> str:
    """Whose operations are not per row."""
    read = {matrix.operator.rpartition(".")[2] for matrix in found.matrices}
    notes = (
        (read & {*CONVOLUTIONS}, "a convolution's per place"),
        (read & {*TRANSPOSED}, "a transposed convolution's per place of its input"),
        (read & {*RECURRENT}, "a recurrent layer's per step"),
        ("If" in found.operators, "with all branches"),
        (found.operators.keys() & {*LOOPS}, "a loop's per turn"),
    )
    return "".join(f", {note}" for holds, note in notes if holds)


def _port_rows(ports: Iterable[tuple[str, Port]]) -> list[tuple[str, str, str, str]]:
    """Ports that differ only in a number, such as the caches of layers, on one line."""
    rows: dict[tuple[str, str, str, str], int] = {}
    for side, port in ports:
        shape = "?" if port.shape is None else f"[{', '.join(map(str, port.shape))}]"
        row = (side, _starred(port.name), port.dtype, shape)
        rows[row] = rows.get(row, 0) + 1
    return [(side, _times(name, n), kind, shape) for (side, name, kind, shape), n in rows.items()]


def _grouped(matrices: Iterable[Matrix]) -> list[Matrix]:
    """Those that differ only in a number of their names as one, with the sums of all."""
    groups: dict[tuple[str, ...], list[Matrix]] = {}
    for matrix in matrices:
        key = (_starred(matrix.name), matrix.operator, matrix.precision, str(matrix.shape))
        groups.setdefault(key, []).append(matrix)
    return [
        replace(
            group[0],
            name=_times(name if len(group) > 1 else group[0].name, len(group)),
            parameters=sum(matrix.parameters for matrix in group),
            bytes=sum(matrix.bytes for matrix in group),
        )
        for (name, *_), group in groups.items()
    ]


def _starred(name: str) -> str:
    return re.sub(r"(?<=[._/])\d+(?=[._/]|$)", "*", name)


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ({count}×)"
