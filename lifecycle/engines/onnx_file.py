"""Finds the files that an ONNX graph takes its weights from, without the onnx package.

A graph can name any file of the machine as its external data, so the names are read and
checked before a runtime opens them. Only the few messages of onnx.proto that lead there are
followed; everything else is skipped by its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lifecycle.errors import EngineError

_LARGEST = 2**31 - 1
"""Bytes that a protobuf message may have."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_LEADS_TO: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
"""Message -> field number -> message; `Entry` is one key and value of the external data."""


def check_external_data(graph: Path) -> list[str]:
    """The files of a graph's weights, relative to its folder; they must be there, and inside.

    Raises:
        EngineError: names the file and what is wrong with it.
    """
    try:
        if graph.stat().st_size > _LARGEST:
            raise EngineError(
                f"{graph} is larger than 2 GiB, which no reader of ONNX takes; save it with its "
                "weights as external data beside it"
            )
        data = memoryview(graph.read_bytes())
    except OSError as error:
        raise EngineError(f"{graph} cannot be read: {error.strerror}") from error
    try:
        locations = set(_locations(data, "Model"))
    except (ValueError, IndexError, RecursionError) as error:
        raise EngineError(f"{graph} is damaged: it is no ONNX graph") from error
    folder = graph.parent.resolve()
    for location in sorted(locations):
        try:
            path = (folder / location).resolve()
            is_inside, is_file = path.is_relative_to(folder), path.is_file()
        except (OSError, RuntimeError, ValueError) as error:
            raise EngineError(f"{graph} takes weights from {location!r}: {error}") from error
        if not is_inside:
            raise EngineError(
                f"{graph} takes weights from '{location}', outside its own folder; "
                "that is refused: put the file beside the graph"
            )
        if not is_file:
            raise EngineError(f"{path} is missing: {graph.name} takes its weights from it")
    return sorted(locations)


def _locations(data: memoryview, message: str) -> Iterator[str]:
    """The `location` of every tensor below a message."""
    for field, value in _fields(data):
        below = _LEADS_TO[message].get(field)
        if below is None or value is None:
            continue
        if below != "Entry":
            yield from _locations(value, below)
            continue
        entry = {number: bytes(text or b"") for number, text in _fields(value)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode()


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """The fields of a protobuf message: number, and the bytes of those that have a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag >> 32:
            # Parsers that cut a tag to 32 bits would see a field that is passed over here.
            raise ValueError("a tag is too long")
        field, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is longer than its message")
            yield field, data[at : at + size]
            at += size
        elif wire == _VARINT:
            _, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise ValueError("a number is too long")
    return value | data[at] << shift, at + 1
