"""Recorded traffic, in the format of the traces of Mooncake (Qin et al., FAST 2025).

One JSON object a line: `timestamp` in milliseconds, `input_length` and `output_length` in tokens, and
`hash_ids`, one for each block of 512 tokens of the prompt, the last of which may be shorter. An id
stands for the whole prompt up to the end of its block: prompts with the same id are the same up to there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from lifecycle.benchmarking.workload import PlannedRequest, Tokens, Workload, warm_up
from lifecycle.errors import DataError

BLOCK = 512
"""Tokens that one hash id stands for."""


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One request of a trace."""

    timestamp: float
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]

    def scaled(self, scale: float) -> tuple[int, int]:
        """Tokens of prompt and output when lengths are divided; at least one each."""
        return max(1, int(self.input_length / scale)), max(1, int(self.output_length / scale))


@dataclass(frozen=True, slots=True)
class Fitted:
    """The entries of a trace that a context has room for."""

    entries: tuple[TraceEntry, ...]
    skipped: int
    """Those that it has no room for."""
    longest: int
    """Tokens of the longest request, whether it fits or not, before it was divided."""
    needed: int
    """Tokens that the longest of `entries` takes."""


def read_trace(path: Path, limit: int | None = None) -> list[TraceEntry]:
    """The first `limit` requests, in the order of the file.

    Raises:
        DataError: the file cannot be read, has no request, or a line is not what it should be.
    """
    try:
        with path.open(encoding="utf-8") as file:
            found = list(_entries(path, file, limit))
    except OSError as error:
        raise DataError(f"--trace {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--trace {path} cannot be read: {error}") from error
    if not found:
        raise DataError(f"--trace {path} has no request: give a file with one JSON object a line")
    return found


def fit(entries: Sequence[TraceEntry], scale: float, context: int | None) -> Fitted:
    """Leave out what has no room in `context` tokens once lengths are divided by `scale`."""
    totals = [sum(entry.scaled(scale)) for entry in entries]
    pairs = [
        (e, t) for e, t in zip(entries, totals, strict=True) if context is None or t <= context
    ]
    return Fitted(
        entries=tuple(entry for entry, _ in pairs),
        skipped=len(entries) - len(pairs),
        longest=max(entry.input_length + entry.output_length for entry in entries),
        needed=max((total for _, total in pairs), default=0),
    )


def scale_for(longest: int, context: int) -> int:
    """A scale at which a request of `longest` tokens fits into a context."""
    # Prompt and output are one token at least, whatever the scale.
    return max(1, math.ceil(longest / max(1, context - 2)))


def trace_workload(
    entries: Sequence[TraceEntry],
    *,
    scale: float,
    speed: float,
    num_slots: int,
    vocab_size: int,
    seed: int,
) -> Workload:
    """The requests of a trace at their times, which `speed` makes shorter."""
    blocks: dict[int, Tokens] = {}
    start = min(entry.timestamp for entry in entries)
    requests = [
        PlannedRequest(
            prompt=_prompt(entry, scale, vocab_size, seed, blocks),
            output_len=entry.scaled(scale)[1],
            arrival=(entry.timestamp - start) / 1000 / speed,
        )
        for entry in sorted(entries, key=lambda entry: entry.timestamp)
    ]
    lengths = [(len(request.prompt), request.output_len) for request in requests[:num_slots]]
    return Workload(tuple(requests), warm_up([seed], lengths, vocab_size))


def _prompt(
    entry: TraceEntry, scale: float, vocab_size: int, seed: int, blocks: dict[int, Tokens]
) -> Tokens:
    """Random tokens that depend on the ids of the blocks alone."""
    length, _ = entry.scaled(scale)
    most = math.ceil(BLOCK / scale) + 1
    parts: list[Tokens] = []
    for index, hash_id in enumerate(entry.hash_ids):
        if hash_id not in blocks:
            rng = np.random.default_rng([seed, hash_id])
            blocks[hash_id] = rng.integers(0, vocab_size, most, dtype=np.int32)
        size = int((index + 1) * BLOCK / scale) - int(index * BLOCK / scale)
        # One token is left of a prompt whose blocks are all divided away.
        is_last = index == len(entry.hash_ids) - 1
        parts.append(blocks[hash_id][: size + is_last])
    return np.concatenate(parts)[:length]


def _entries(path: Path, lines: Iterator[str], limit: int | None) -> Iterator[TraceEntry]:
    count = 0
    for number, line in enumerate(lines, start=1):
        if count == limit:
            return
        if line.strip():
            count += 1
            yield _entry(f"--trace {path}:{number}", line)


def _entry(where: str, line: str) -> TraceEntry:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON object ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: no JSON object, but {line.strip()[:40]}")
    row = cast("dict[str, Any]", values)
    timestamp = row.get("timestamp")
    # The comparison is written so that NaN fails it; true and false are no times.
    if type(timestamp) not in (int, float) or not (0 <= cast("float", timestamp) < math.inf):
        raise DataError(f"{where}: timestamp is {timestamp!r}; it must be milliseconds, 0 or more")
    prompt, output = (_length(where, row, name) for name in ("input_length", "output_length"))
    return TraceEntry(cast("float", timestamp), prompt, output, _hash_ids(where, row, prompt))


def _length(where: str, row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if type(value) is not int or value < 1:
        raise DataError(f"{where}: {name} is {value!r}; it must be a count of tokens, 1 or more")
    return value


def _hash_ids(where: str, row: dict[str, Any], input_length: int) -> tuple[int, ...]:
    ids = row.get("hash_ids")
    wanted = math.ceil(input_length / BLOCK)
    if not isinstance(ids, list):
        raise DataError(f"{where}: hash_ids is {ids!r}; it must be a list of integers, 0 or more")
    found = cast("list[Any]", ids)
    if any(type(id) is not int or id < 0 for id in found):
        raise DataError(f"{where}: hash_ids has what is no integer of 0 or more")
    if len(found) != wanted:
        raise DataError(
            f"{where}: hash_ids has {len(found)} ids; a prompt of {input_length} tokens has "
            f"{wanted}, one for each {BLOCK}"
        )
    return tuple(found)
