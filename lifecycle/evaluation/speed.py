"""How fast models decode beside each other, so that a busy machine slows all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.base import Engine
from lifecycle.engines.limits import available_memory
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import EngineError, StageError
from lifecycle.evaluation.subject import opened, weight_bytes
from lifecycle.kinds import OnnxModel
from lifecycle.pipeline.stage import Progress

ROUNDS = 31
"""Most turns that are timed; one more comes before them, in which caches and threads warm up."""
_FEWEST_ROUNDS = 5
_STEPS = 8
"""Most decoding steps of a turn, after one that is not timed: the threads of the model that had
the turn before still spin in it. Many short turns lose fewer to what else the machine does."""
_PROMPT = 128
_MEMORY_PER_BYTE = 2.5
"""Memory that an open model takes for each byte of its file: the file and a packed copy."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one model decodes."""

    tokens_per_second: float
    """New tokens of all requests together; the median of the rounds."""
    ratio: float
    """Over the first model; the median of the rounds' ratios, each of two turns that lie side by
    side. Above 1 is faster."""
    error: float
    """Standard error of `ratio`, as a part of it, from the middle half of those ratios."""


def decode_speeds(engines: Sequence[Engine], batch: int, progress: Progress) -> list[Speed]:
    """Let models decode in turns, `batch` requests at a time, each of random tokens.

    Only decoding is timed. All models are at the same length of context in the same round.

    Raises:
        StageError: the context is too short to decode in.
        EngineError: an engine failed.
    """
    prompt, rounds, steps = _lengths(min(engine.max_model_len for engine in engines), batch)
    seconds: list[list[float]] = [[] for _ in engines]
    try:
        for engine in engines:
            _prefill(engine, batch, prompt)
        for turn in range(rounds + 1):
            # To and fro, so that no model always comes after the same other one.
            order = range(len(engines)) if turn % 2 else reversed(range(len(engines)))
            for index in order:
                seconds[index].append(_turn(engines[index], steps))
            progress.update(turn + 1, rounds + 1)
    finally:
        for engine in engines:
            _end(engine, batch)
    timed = np.array(seconds)[:, 1:]
    return [_speed(timed[0], own, batch * steps) for own in timed]


def speeds_beside(
    reference: OnnxModel, models: Sequence[OnnxModel], batch: int, progress: Progress
) -> dict[str, Speed]:
    """The speeds of models beside a reference, and its own, by their digests.

    As many are open at a time as fit into memory.

    Raises:
        StageError, EngineError: as `decode_speeds`, or a model cannot be opened.
    """
    others = list({m.digest: m for m in models if m.digest != reference.digest}.values())
    ratios: dict[str, Speed] = {}
    own: list[float] = []
    for group in _groups(reference, others):
        with ExitStack() as stack:
            subjects = [stack.enter_context(opened(m, batch)) for m in (reference, *group)]
            first, *rest = decode_speeds([s.engine for s in subjects], batch, progress)
        own.append(first.tokens_per_second)
        ratios |= {model.digest: speed for model, speed in zip(group, rest, strict=True)}
    base = median(own)
    # What had its turns at different times compares by ratios only.
    return {reference.digest: Speed(base, 1.0, 0.0)} | {
        digest: replace(speed, tokens_per_second=base * speed.ratio)
        for digest, speed in ratios.items()
    }


def _groups(reference: OnnxModel, models: Sequence[OnnxModel]) -> Iterator[list[OnnxModel]]:
    """As many models at a time as fit into memory beside the reference; at least one."""
    free = available_memory()
    room = math.inf if free is None else free - _MEMORY_PER_BYTE * weight_bytes(reference)
    group: list[OnnxModel] = []
    used = 0.0
    for model in models:
        need = _MEMORY_PER_BYTE * weight_bytes(model)
        if group and used + need > room:
            yield group
            group, used = [], 0.0
        group.append(model)
        used += need
    yield group


def _speed(reference: NDArray[np.float64], own: NDArray[np.float64], tokens: int) -> Speed:
    ratios = reference / own
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    # Of normal values: 1.35 deviations between the quartiles, and a median that is 1.25 times as
    # uncertain as the mean.
    error = 1.25 * (high - low) / 1.35 / math.sqrt(len(ratios))
    return Speed(tokens / float(np.median(own)), middle, error / middle)


def _lengths(context: int, batch: int) -> tuple[int, int, int]:
    """Tokens of a prompt, rounds, and timed steps of a turn, so that all fit into the context."""
    # While the last prompt is read, the first request may decode `batch` tokens; then come one
    # token of a prompt at least, and one step of each turn that is not timed.
    room = context - 2 - batch
    steps = min(_STEPS, max(1, room // (ROUNDS + 1) - 1))
    rounds = min(ROUNDS, room // (steps + 1) - 1)
    if rounds < _FEWEST_ROUNDS:
        needed = (_FEWEST_ROUNDS + 1) * (steps + 1) + 2 + batch
        raise StageError(
            f"speed cannot be measured at batch {batch} in a context of {context} tokens; it takes "
            f"{needed}"
        )
    return min(_PROMPT, room + 1 - (rounds + 1) * (steps + 1)), rounds, steps


def _prefill(engine: Engine, batch: int, prompt: int) -> None:
    """Bring `batch` requests to where they decode."""
    random = np.random.default_rng(0)
    params = SamplingParams(max_tokens=engine.max_model_len, ignore_eos=True)
    for index in range(batch):
        tokens = random.integers(0, engine.vocab_size, prompt).tolist()
        engine.submit(Request(str(index), tokens, params))
    while len(_step(engine)) < batch:
        pass


def _turn(engine: Engine, steps: int) -> float:
    """Seconds for so many steps, all requests decoding."""
    _step(engine)
    start = time.perf_counter()
    for _ in range(steps):
        _step(engine)
    return time.perf_counter() - start


def _step(engine: Engine) -> set[str]:
    events = engine.step()
    if ended := next((event for event in events if event.finish_reason is not None), None):
        raise EngineError(f"an engine failed while it was timed: {ended.error or ended}")
    return {event.request_id for event in events}


def _end(engine: Engine, batch: int) -> None:
    for index in range(batch):
        engine.cancel(str(index))
    engine.step()
