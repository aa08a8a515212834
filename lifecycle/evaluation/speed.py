"""How fast models decode beside each other, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from lifecycle.engines.base import Engine, Request, SamplingParams
from lifecycle.errors import EngineError, StageError
from lifecycle.pipeline.stage import Progress

ROUNDS = 15
"""Turns that are timed; one more comes before them, in which caches and threads warm up."""
_STEPS = 16
"""Most decoding steps of a turn, after one that is not timed: the threads of the model that had
the turn before still spin in it."""
_PROMPT = 128


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one model decodes."""

    tokens_per_second: float
    """New tokens of all requests together; the median of the rounds."""
    ratio: float
    """Over the first model; the median of the rounds' ratios, each of two turns that lie side by
    side. Above 1 is faster."""
    spread: float
    """Half of the middle half of those ratios, as a part of `ratio`."""


def decode_speeds(engines: Sequence[Engine], batch: int, progress: Progress) -> list[Speed]:
    """Let models decode in turns, `batch` requests at a time, each of random tokens.

    Only decoding is timed. All models are at the same length of context in the same round.

    Raises:
        StageError: the context is too short to decode in.
        EngineError: an engine failed.
    """
    prompt, steps = _lengths(min(engine.max_model_len for engine in engines), batch)
    seconds: list[list[float]] = [[] for _ in engines]
    try:
        for engine in engines:
            _prefill(engine, batch, prompt)
        for turn in range(ROUNDS + 1):
            # To and fro, so that no model always comes after the same other one.
            order = range(len(engines)) if turn % 2 else reversed(range(len(engines)))
            for index in order:
                seconds[index].append(_turn(engines[index], steps))
            progress.update(turn + 1, ROUNDS + 1)
    finally:
        for engine in engines:
            _end(engine, batch)
    timed = np.array(seconds)[:, 1:]
    return [_speed(timed[0], own, batch * steps) for own in timed]


def _speed(reference: np.ndarray, own: np.ndarray, tokens: int) -> Speed:
    ratios = reference / own
    low, high = np.quantile(ratios, (0.25, 0.75))
    ratio = float(median(ratios))
    return Speed(tokens / float(median(own)), ratio, float(high - low) / 2 / ratio)


def _lengths(context: int, batch: int) -> tuple[int, int]:
    """Tokens of a prompt and timed steps of a turn, so that all turns fit into the context."""
    # While the last prompt is read, the first request may decode `batch` tokens.
    room = context - 1 - batch
    steps = min(_STEPS, (room - 1) // (ROUNDS + 1) - 1)
    if steps < 1:
        raise StageError(
            f"speed cannot be measured at batch {batch} in a context of {context} tokens; it takes "
            f"{2 * (ROUNDS + 1) + 2 + batch}"
        )
    return min(_PROMPT, room - (ROUNDS + 1) * (steps + 1)), steps


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
