"""Finds the files that an ONNX graph takes its weights from, and changes where, without the onnx package.

A graph can name any file of the machine as its external data, so the names are read and
checked before a runtime opens them. Only the few messages of onnx.proto that lead there are
followed; everything else is skipped by its length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
_GRAPH, _INITIALIZER, _NAME, _EXTERNAL_DATA = 7, 5, 8, 13
"""Fields of a model, of its graph, and of a tensor."""

Entries = dict[str, str]
"""Where a tensor's bytes are: `location`, `offset`, `length`, and what else was said with them."""


def check_external_data(graph: Path) -> list[str]:
    """The files of a graph's weights, relative to its folder; they must be there, and inside, and no links.

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
        if path != Path(os.path.normpath(folder / location)):
            raise EngineError(
                f"{graph} takes weights from '{location}' through a link, which may lead elsewhere by the time that it "
                "is followed; that is refused: put the file itself beside the graph"
            )
        if not is_file:
            raise EngineError(f"{path} is missing: {graph.name} takes its weights from it")
    return sorted(locations)


def external_tensors(data: bytes) -> dict[str, Entries]:
    """The initializers of a model whose bytes are in other files, by name.

    Raises:
        ValueError, IndexError: it is no ONNX model.
    """
    found: dict[str, Entries] = {}

    def note(name: str, entries: Entries) -> None:
        found[name] = entries

    change_external_tensors(data, note)
    return found


def change_external_tensors(data: bytes, change: Callable[[str, Entries], Entries | None]) -> bytes:
    """A model with other places for its initializers' bytes.

    Args:
        change: is told an initializer's name and where it is, and says where it is to be; None leaves
            it.

    Raises:
        ValueError, IndexError: it is no ONNX model.
    """

    def tensor(message: memoryview) -> bytes:
        fields = list(spans(message))
        names = [bytes(value or b"").decode() for field, value, _ in fields if field == _NAME]
        old = [_entry(value) for field, value, _ in fields if field == _EXTERNAL_DATA and value]
        new = change(names[-1] if names else "", dict(old)) if old else None
        if new is None:
            return bytes(message)
        kept = b"".join(message[span] for field, _, span in fields if field != _EXTERNAL_DATA)
        entries = (field_of(1, k.encode()) + field_of(2, v.encode()) for k, v in new.items())
        return kept + b"".join(field_of(_EXTERNAL_DATA, entry) for entry in entries)

    def graph(message: memoryview) -> bytes:
        return _replaced(message, _INITIALIZER, tensor)

    return _replaced(memoryview(data), _GRAPH, graph)


def _replaced(data: memoryview, field: int, change: Callable[[memoryview], bytes]) -> bytes:
    """A message with other messages in one of its fields."""
    parts: list[bytes | memoryview] = []
    for number, value, span in spans(data):
        if number == field and value is not None:
            parts.append(field_of(field, change(value)))
        else:
            parts.append(data[span])
    return b"".join(parts)


def _locations(data: memoryview, message: str) -> Iterator[str]:
    """The `location` of every tensor below a message."""
    for field, value, _ in spans(data):
        below = _LEADS_TO[message].get(field)
        if below is None or value is None:
            continue
        if below != "Entry":
            yield from _locations(value, below)
            continue
        key, text = _entry(value)
        if key == "location":
            yield text


def _entry(data: memoryview) -> tuple[str, str]:
    """A key and its value."""
    entry = {number: bytes(text or b"") for number, text, _ in spans(data)}
    return entry.get(1, b"").decode(), entry.get(2, b"").decode()


def spans(data: memoryview) -> Iterator[tuple[int, memoryview | None, slice]]:
    """The fields of a protobuf message: number, the bytes of those that have a length, and where they
    are in the message."""
    at = 0
    while at < len(data):
        begun = at
        tag, at = _varint(data, at)
        if tag >> 32:
            # Parsers that cut a tag to 32 bits would see a field that is passed over here.
            raise ValueError("a tag is too long")
        field, wire = tag >> 3, tag & 7
        value = None
        if wire == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is longer than its message")
            value = data[at : at + size]
            at += size
        elif wire == _VARINT:
            _, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        yield field, value, slice(begun, at)


def field_of(number: int, value: bytes) -> bytes:
    """A field that has a length."""
    return _number(number << 3 | _BYTES) + _number(len(value)) + value


def number_of(number: int, value: int) -> bytes:
    """A field that is a number, 0 or more."""
    return _number(number << 3) + _number(value)


def _number(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise ValueError("a number is too long")
    return value | data[at] << shift, at + 1
