"""Workloads: what is random, what is the same again, and which prompts begin alike."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lifecycle.benchmarking.trace import (
    BLOCK,
    TraceEntry,
    fit,
    read_trace,
    scale_for,
    trace_workload,
)
from lifecycle.benchmarking.workload import closed_loop, open_loop, poisson_arrivals
from lifecycle.errors import DataError

ROW: dict[str, Any] = {
    "timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]
}  # fmt: skip


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def workload(*entries: TraceEntry, scale: float = 1.0, speed: float = 1.0):
    return trace_workload(
        entries, scale=scale, speed=speed, num_slots=2, vocab_size=5000, seed=3
    ).requests


def test_a_seed_gives_the_same_tokens_again_and_no_other_prompt_begins_with_them() -> None:
    def prompts(seed: int, concurrency: int = 2) -> list[list[int]]:
        made = closed_loop(32, 5, concurrency, 4, vocab_size=300, seed=seed)
        return [r.prompt.tolist() for r in (*made.requests, *made.warm_up)]

    assert prompts(1) == prompts(1)
    every = prompts(1) + prompts(2) + prompts(1, concurrency=3)
    assert len({tuple(prompt[:8]) for prompt in every}) == len(every)
    assert all(len(p) == 32 and min(p) >= 0 and max(p) < 300 for p in every)


def test_arrivals_are_a_seeded_poisson_process() -> None:
    arrivals = poisson_arrivals(4.0, 4000, seed=1)
    assert arrivals == poisson_arrivals(4.0, 4000, seed=1) != poisson_arrivals(4.0, 4000, seed=2)
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert gaps.min() >= 0
    # Exponential gaps have as much deviation as mean.
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(0.25, rel=0.1)
    made = open_loop(8, 4, 4.0, 10, num_slots=2, vocab_size=99, seed=1)
    assert [request.arrival for request in made.requests] == arrivals[:10]
    assert (made.concurrency, len(made.warm_up)) == (None, 2)


def test_a_workload_says_how_long_requests_come() -> None:
    options: Any = {"vocab_size": 9, "seed": 0}
    assert open_loop(2, 1, 0.01, 3, num_slots=1, **options).arrivals == "3 requests over 104 s"
    assert closed_loop(2, 1, 1, 3, **options).arrivals == ""


def test_hash_ids_say_which_prompts_begin_alike() -> None:
    first, second, third = workload(
        TraceEntry(1000, 1100, 5, (1, 2, 3)),
        TraceEntry(2000, 1500, 5, (1, 2, 4)),
        TraceEntry(4000, 512, 5, (9,)),
        speed=2.0,
    )
    assert [len(r.prompt) for r in (first, second, third)] == [1100, 1500, 512]
    assert [r.arrival for r in (first, second, third)] == [0, 0.5, 1.5]
    shared = 2 * BLOCK
    assert (first.prompt[:shared] == second.prompt[:shared]).all()
    assert (first.prompt[shared:] != second.prompt[shared:1100]).mean() > 0.9
    assert (first.prompt[:BLOCK] != third.prompt).mean() > 0.9


@pytest.mark.parametrize("scale", [1.0, 37.0, 100.5, 600.0, 0.5])
def test_shared_prefixes_stay_shared_when_lengths_are_divided(data_dir: Path, scale: float) -> None:
    entries = read_trace(data_dir / "mooncake_trace" / "synthetic_trace.jsonl", 60)
    assert len(entries) == 60
    requests = workload(*entries, scale=scale)
    for entry, request in zip(entries, requests, strict=True):
        assert (len(request.prompt), request.output_len) == entry.scaled(scale)
    pairs = list(combinations(zip(entries, requests, strict=True), 2))
    for (a, one), (b, other) in pairs:
        same = [x == y for x, y in zip(a.hash_ids, b.hash_ids, strict=False)]
        blocks = same.index(False) if False in same else len(same)
        shared = int(blocks * BLOCK / scale)
        n = min(shared, len(one.prompt), len(other.prompt))
        assert (one.prompt[:n] == other.prompt[:n]).all()
    assert any(a.hash_ids[0] == b.hash_ids[0] for (a, _), (b, _) in pairs)


def test_what_does_not_fit_is_counted_and_a_scale_makes_it_fit() -> None:
    entries = [
        TraceEntry(0, 90, 10, (1,)),
        TraceEntry(1, 500, 100, (2,)),
        TraceEntry(2, 1, 1, (3,)),
    ]
    found = fit(entries, 1.0, 100)
    assert found.entries == (entries[0], entries[2])
    assert (found.skipped, found.longest, found.needed) == (1, 600, 100)
    assert fit(entries, float(scale_for(600, 100)), 100).skipped == 0
    assert fit(entries, 1.0, None).needed == 600


def test_a_trace_is_read_up_to_a_limit_and_empty_lines_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ROW, "", ROW | {"timestamp": 6.5}, "not read")
    assert read_trace(path, 2) == [
        TraceEntry(5, 600, 7, (1, 2)), TraceEntry(6.5, 600, 7, (1, 2))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "no JSON object"),
        ("[1]", r"no JSON object, but \[1\]"),
        ({"timestamp": -1}, "timestamp is -1"),
        ({"timestamp": True}, "timestamp is True"),
        ({"timestamp": float("nan")}, "timestamp is nan"),
        ({"input_length": 0}, "input_length is 0; it must be a count of tokens, 1 or more"),
        ({"output_length": None}, "output_length is None"),
        ({"hash_ids": 3}, "hash_ids is 3"),
        ({"hash_ids": [1, -2]}, "hash_ids has what is no integer"),
        ({"hash_ids": [1]}, "hash_ids has 1 ids; a prompt of 600 tokens has 2, one for each 512"),
    ],
)
def test_a_bad_line_is_named(bad: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ROW, "", bad if isinstance(bad, str) else ROW | bad)
    with pytest.raises(DataError, match=rf"--trace .*t\.jsonl:3: {message}"):
        read_trace(path)


def test_a_trace_without_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no request"):
        read_trace(write(tmp_path / "t.jsonl", ""))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none")
