"""Requests that decode together while something is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from lifecycle.engines.base import Engine
from lifecycle.engines.requests import Request, SamplingParams


@contextmanager
def decoding(
    engine: Engine, count: int, length: int, params: SamplingParams | None = None
) -> Iterator[None]:
    """While the block runs each step gives one token of each of `count` requests, without end; their
    prompts have `length` tokens and are computed before it. `params` say how they choose."""
    rng = np.random.default_rng(0)
    endless = replace(params or SamplingParams(), max_tokens=10**6, ignore_eos=True)
    for index in range(count):
        engine.submit(Request(f"decodes {index}", rng.integers(3, 1000, length).tolist(), endless))
    while len(engine.step()) < count:
        pass
    yield
    for index in range(count):
        engine.cancel(f"decodes {index}")
    engine.step()
