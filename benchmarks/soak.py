"""Many short requests of every kind against one engine: none is lost, none gets stuck, no memory is kept.

    python -m benchmarks.soak CHECKPOINT [--requests 20000] [--seed 0] [--json]

Prompts begin alike or are equal; requests are greedy, drawn, penalised, scored or constrained, of three
priorities and three tenants, some with a deadline, one in ten is cancelled, and tokens are guessed. One in four of
the greedy ones is compared with what it gives alone. There are two runs: the cache has room for three of eight
contexts, or for all. It ends with exit code 1 and a word on what was wrong, a growing process included. CHECKPOINT
is a Hugging Face folder of a decoder.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import parser_of
from benchmarks.watched import SoakError, WatchedEngine, expect
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import FinishReason, Request, SamplingParams
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu

CONTEXT, CHUNK, SLOTS = 160, 32, 8
_AHEAD = 20
"""Requests that are there at once, on average."""
_GROWTH = 16 << 20
"""Bytes by which the process may grow after a quarter of the requests, its cache aside: what allocators do not give
back."""
_PATIENCE = 20_000
"""Steps after which a request that has not ended is stuck."""


class Phrase:
    """A constraint: choose one of some tokens, then two that follow from it, so many times."""

    def __init__(self, vocab_size: int, times: int) -> None:
        self._vocab_size, self._left = vocab_size, 3 * times
        self._last = 0

    def mask(self) -> NDArray[np.bool_]:
        """The tokens that may come next, [vocab_size]."""
        found = np.zeros(self._vocab_size, np.bool_)
        if self._left % 3 == 0:
            found[3::5] = True
        else:
            found[self._next()] = True
        return found

    def accept(self, token: int) -> None:
        """Take note of a token."""
        expect(bool(self.mask()[token]), f"the token {token} came, which its constraint forbids")
        self._last, self._left = token, self._left - 1

    def forced(self) -> Sequence[int]:
        """The tokens that must come next."""
        first = self._next()
        found = [first, (first * 7 + 3) % self._vocab_size]
        return found[: self._left % 3]

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._left == 0

    def _next(self) -> int:
        return (self._last * 7 + 3) % self._vocab_size


@dataclass
class Course:
    """A request and what has come of it."""

    request: Request
    submitted_at: int
    tokens: list[int] = field(default_factory=list[int])
    is_cancelled: bool = False


class Soak:
    """One run over one engine; `plain` computes requests alone."""

    def __init__(self, engine: OnnxEngine, plain: OnnxEngine, seed: int) -> None:
        self._engine, self._plain = engine, plain
        self._rng = np.random.default_rng(seed)
        self._begins = [self._text(length) for length in (33, 64, 70)]
        self._courses: dict[str, Course] = {}
        self._step = self._count = 0
        self.ends = Counter[FinishReason]()
        self.compared = 0
        self.resident: dict[int, int] = {}
        """Bytes by requests that had been submitted."""

    def run(self, count: int) -> None:
        """Let `count` requests come and go.

        Raises:
            SoakError: something was wrong.
        """
        marks = {count * part // 8 for part in range(1, 9)}
        while self._count < count or self._courses:
            if self._count < count and self._rng.random() * _AHEAD > len(self._courses) / 2:
                self._submit(min(int(self._rng.choice([1, 1, 1, 4])), count - self._count))
            if self._courses and self._rng.random() < 0.05:
                self._cancel(self._rng.choice(sorted(self._courses)))
            self._take()
            for mark in [mark for mark in marks if mark <= self._count]:
                marks.remove(mark)
                self.resident[mark] = resident_bytes()
        self._check_end()

    def _submit(self, copies: int) -> None:
        prompt, params = self._prompt(), self._params()
        rng = self._rng
        for _ in range(copies):
            request = Request(
                str(self._count),
                prompt,
                params,
                cache_salt=str(rng.choice(["", "", "a"])),
                priority=int(rng.integers(0, 3)),
                tenant=str(rng.choice(["x", "y", "z"])),
                timeout=float(rng.exponential(0.05)) if rng.random() < 0.1 else None,
                constraint=self._constraint(params),
            )
            self._engine.submit(request)
            self._courses[request.id] = Course(request, self._step)
            self._count += 1

    def _cancel(self, id: str) -> None:
        self._engine.cancel(id)
        self._courses[id].is_cancelled = True

    def _text(self, length: int) -> list[int]:
        return self._rng.integers(3, self._engine.vocab_size, length).tolist()

    def _prompt(self) -> list[int]:
        """Half of them begin alike; some repeat themselves."""
        rng = self._rng
        own = self._text(int(rng.integers(1, 40)))
        if rng.random() < 0.3:
            own = (own[:4] * 10)[: len(own)]
        begin = self._begins[rng.integers(len(self._begins))] if rng.random() < 0.5 else []
        return [*begin, *own]

    def _params(self) -> SamplingParams:
        rng = self._rng
        params = SamplingParams(max_tokens=int(rng.integers(1, 25)), ignore_eos=rng.random() < 0.5)
        kind = rng.random()
        if kind < 0.2:
            return replace(params, temperature=1.0, top_p=0.9, seed=int(rng.integers(1 << 30)))
        if kind < 0.3:
            return replace(params, repetition_penalty=1.2, dry_multiplier=0.5, min_tokens=1)
        if kind < 0.4:
            return replace(params, logprobs=2, prompt_logprobs=1)
        if kind < 0.5:
            # A text that repeats itself: guesses are right.
            return replace(params, logit_bias={int(rng.integers(3, 9)): 100.0})
        return params

    def _constraint(self, params: SamplingParams) -> Phrase | None:
        is_free = params.ignore_eos or self._rng.random() < 0.8
        return None if is_free else Phrase(self._engine.vocab_size, int(self._rng.integers(1, 5)))

    def _take(self) -> None:
        self._step += 1
        for event in self._engine.step():
            course = self._courses.get(event.request_id)
            expect(course is not None, f"an event after its end, or of nobody: {event}")
            assert course is not None
            if event.token_id is not None:
                course.tokens.append(event.token_id)
            if event.finish_reason is not None:
                self._end(course, event.finish_reason, event.error)
        oldest = next(iter(self._courses.values()), None)
        is_stuck = oldest is not None and self._step - oldest.submitted_at > _PATIENCE
        expect(not is_stuck, f"stuck: {oldest}")

    def _end(self, course: Course, reason: FinishReason, error: str) -> None:
        request, count = course.request, len(course.tokens)
        del self._courses[request.id]
        self.ends[reason] += 1
        expect(reason is not FinishReason.ERROR, f"{request}: {error}")
        expect(
            reason is not FinishReason.TIMEOUT or request.timeout is not None, f"no time: {request}"
        )
        expect((reason is FinishReason.CANCELLED) == course.is_cancelled, f"cancelled: {course}")
        most = min(request.params.max_tokens, CONTEXT - len(request.prompt))
        expect(count == most or reason is not FinishReason.LENGTH, f"{count} tokens: {request}")
        is_greedy = request.params == SamplingParams(
            request.params.max_tokens, ignore_eos=request.params.ignore_eos
        )
        if is_greedy and request.constraint is None and int(request.id) % 4 == 0:
            alone = self._plain.generate([request.prompt], request.params)[0]
            is_whole = reason in (FinishReason.STOP, FinishReason.LENGTH)
            self.compared += 1
            wanted = alone.token_ids if is_whole else alone.token_ids[:count]
            got = tuple(course.tokens)
            expect(got == wanted, f"{got} instead of {wanted}, what it gives alone: {request}")

    def _check_end(self) -> None:
        stats, scheduler = self._engine.stats, self._engine._scheduler  # pyright: ignore[reportPrivateUsage]
        held = (stats.num_running, stats.num_waiting, stats.cache_tokens, stats.cache_bytes)
        expect(held == (0, 0, 0, 0), f"something is held when all have ended: {stats}")
        free = sorted(scheduler._free)  # pyright: ignore[reportPrivateUsage]
        expect(free == list(range(SLOTS)), f"slots that are free at the end: {free}")


def resident_bytes() -> int:
    """What the process has in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def open_engines(graph: Path, *, is_bounded: bool) -> tuple[OnnxEngine, OnnxEngine]:
    """The engine that is soaked, with all that it can do, and one that does nothing but the work. Where it
    `is_bounded`, its cache has no room for all."""
    plain = OnnxEngine.open(graph, EngineOptions(1, CONTEXT, 1, CHUNK))
    per_token = plain.stats.cache_capacity_bytes // CONTEXT
    options = EngineOptions(
        SLOTS,
        CONTEXT,
        prefill_chunk=CHUNK,
        prefix_cache_bytes=40 * CHUNK * per_token,
        kv_cache_bytes=3 * CONTEXT * per_token if is_bounded else None,
        draft_tokens=4,
    )
    return WatchedEngine.open(graph, options), plain


def soak(graph: Path, count: int, seed: int, *, is_bounded: bool) -> dict[str, Any]:
    """Soak the engine of an exported model; figures of the run.

    Raises:
        SoakError: something was wrong.
    """
    engine, plain = open_engines(graph, is_bounded=is_bounded)
    run = Soak(engine, plain, seed)
    begun = time.perf_counter()
    run.run(count)
    seconds, stats = time.perf_counter() - begun, engine.stats
    marks = sorted(run.resident)
    first, last = marks[1], marks[-1]
    grown = run.resident[last] - run.resident[first]
    most = _GROWTH + stats.cache_capacity_bytes
    expect(grown <= most, f"grown by {grown >> 20} MiB since request {first}: {run.resident}")
    return {
        "requests": count,
        "cache": "bounded" if is_bounded else "for all",
        "seconds": round(seconds, 1),
        "ends": {reason.value: n for reason, n in sorted(run.ends.items())},
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "compared": run.compared,
        "resident_mib": {mark: round(run.resident[mark] / 2**20, 1) for mark in marks},
        "bytes_per_request": round(grown / (last - first), 1),
    }


def main() -> int:
    """Soak and print; 1 if something was wrong."""
    parser = parser_of(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        export_decoder(args.checkpoint, Path(folder), Cpu())
        for is_bounded in (True, False):
            try:
                found = soak(Path(folder), args.requests, args.seed, is_bounded=is_bounded)
            except SoakError as error:
                print(error, file=sys.stderr)
                return 1
            text = "\n".join(f"{name:18} {value}" for name, value in found.items())
            print(json.dumps(found) if args.json else text + "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
