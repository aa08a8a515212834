"""What a server has done and how long it took, for Prometheus; with vLLM's names.

It is kept on the event loop, by what the engine's thread tells anyway. Of the engine itself its thread leaves
its newest figures to be read, so that nobody who looks at them waits for a step.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from lifecycle.engines.requests import Event, FinishReason, Request
from lifecycle.engines.stats import EngineStats
from serving.metrics import Family, Histogram, Sample, Type, write

MAX_MODELS = 100
"""Names of models that are told apart at a time: adapters come and go, and each name has 120 lines."""

REASONS = ("stop", "length", "timeout", "abort", "error")
_ANSWERED = frozenset({"stop", "length", "timeout"})
_BEGUN = frozenset({None, FinishReason.STOP, FinishReason.LENGTH})
"""What the first event of a request that was computed says of its end."""


def _decades(first: int, last: int, steps: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{step}e{power}") for power in range(first, last + 1) for step in steps)


_SECONDS = _decades(-3, 2, (1, 2.5, 5))
_PER_TOKEN = _decades(-3, 0, (1, 1.5, 2, 3, 5, 7.5))
_TOKENS = _decades(0, 4, (1, 2, 5))


class _Model:
    """The figures of one model."""

    def __init__(self) -> None:
        self.prompt_tokens = self.generation_tokens = 0
        self.ends = Counter[str]()
        self.first_token, self.per_token = Histogram(_SECONDS), Histogram(_PER_TOKEN)
        self.latency, self.queue = Histogram(_SECONDS), Histogram(_SECONDS)
        self.prompt_length, self.answer_length = Histogram(_TOKENS), Histogram(_TOKENS)


@dataclass(slots=True)
class _Running:
    """A request on its way."""

    model: _Model
    prompt_length: int
    begun: float
    first: float = inf
    """When its first token came."""
    count: int = 0
    """Tokens generated."""


class Monitor:
    """The figures of a server. A request is one answer to one prompt."""

    def __init__(self, name: str, since: EngineStats | None = None) -> None:
        """`name` is the model's; those of its adapters come as they are asked for. What the engine had done by
        `since`, to warm up, counts as nothing."""
        self._name, self._since = name, since
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._running: dict[str, _Running] = {}
        self._cut: dict[str, _Model] = {}
        """Of requests that a limit has cut, until it is known whether their text ended before that."""
        self._rejections = Counter[str]()
        self._model(name)

    def begin(self, request: Request) -> None:
        """A request has come."""
        model = self._model(request.adapter or self._name)
        self._running[request.id] = _Running(model, len(request.prompt), time.monotonic())

    def take(self, event: Event) -> None:
        """Something has come of a request."""
        running = self._running.get(event.request_id)
        if running is None:
            return
        if running.first == inf and event.finish_reason in _BEGUN:
            running.first = time.monotonic()
            running.model.prompt_tokens += running.prompt_length
            running.model.first_token.observe(running.first - running.begun)
            if event.queue_seconds is not None:
                running.model.queue.observe(event.queue_seconds)
        if event.token_id is not None:
            running.count += 1
            running.model.generation_tokens += 1
        if event.finish_reason is not None:
            self.end(event.request_id, event.finish_reason)

    def end(self, request_id: str, reason: str) -> None:
        """A request has ended; what is already known to have ended is left as it is."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        model = running.model
        if reason == FinishReason.LENGTH:
            self._cut[request_id] = model
        else:
            model.ends[reason] += 1
        if reason not in _ANSWERED:
            return
        now = time.monotonic()
        model.latency.observe(now - running.begun)
        model.prompt_length.observe(running.prompt_length)
        model.answer_length.observe(running.count)
        if running.count > 1:
            model.per_token.observe((now - running.first) / (running.count - 1))

    def settle(self, request_id: str, reason: str = FinishReason.LENGTH) -> None:
        """What is told of a request that a limit has cut: its last token may have completed a stop string."""
        if (model := self._cut.pop(request_id, None)) is not None:
            model.ends[reason] += 1

    def forget(self, request_id: str) -> None:
        """A request was refused."""
        self._running.pop(request_id, None)

    def reject(self, reason: str) -> None:
        """A client was answered 503."""
        self._rejections[reason] += 1

    def page(self, stats: EngineStats) -> str:
        """All figures as Prometheus reads them."""
        return write([*self._of_engine(stats), *self._of_requests()])

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            self._models[name] = _Model()
        self._models.move_to_end(name)
        if len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return self._models[name]

    def _of_engine(self, stats: EngineStats) -> Iterator[Family]:
        # Those that the engine has not taken yet wait too.
        waiting = max(len(self._running) - stats.num_running, 0)
        yield self._one("num_requests_waiting", "gauge", "Requests not in the batch yet.", waiting)
        for name, type, help, value in _OF_ENGINE:
            before = value(self._since) if self._since and type == "counter" else 0
            yield self._one(name, type, help, value(stats) - before)

    def _one(self, name: str, type: Type, help: str, value: float) -> Family:
        return _family(name, type, help, [Sample(value, {"model_name": self._name})])

    def _of_requests(self) -> Iterator[Family]:
        models = self._models.items()
        for name, help, value in _COUNTERS:
            samples = [Sample(value(model), {"model_name": each}) for each, model in models]
            yield _family(name, "counter", help, samples)
        for name, help, histogram in _HISTOGRAMS:
            parts = (histogram(model).samples({"model_name": each}) for each, model in models)
            yield _family(name, "histogram", help, [s for samples in parts for s in samples])
        ends = [
            Sample(model.ends[reason], {"model_name": name, "finished_reason": reason})
            for name, model in models
            for reason in REASONS
        ]
        yield _family("request_success", "counter", "Requests that have ended.", ends)
        rejections = [
            Sample(count, {"model_name": self._name, "reason": reason})
            for reason, count in self._rejections.items()
        ]
        yield _family("admission_rejections", "counter", "Calls answered with 503.", rejections)


def _family(name: str, type: Type, help: str, samples: Sequence[Sample]) -> Family:
    ending = "_total" if type == "counter" else ""
    return Family(f"lifecycle_{name}{ending}", type, help, samples)


def _usage(stats: EngineStats) -> float:
    capacity = stats.cache_capacity_bytes
    return stats.cache_bytes / capacity if capacity else 0.0


_OF_ENGINE: tuple[tuple[str, Type, str, Callable[[EngineStats], float]], ...] = (
    ("num_requests_running", "gauge", "Requests in the batch.", lambda s: s.num_running),
    ("kv_cache_usage_perc", "gauge", "Used part of the KV cache; 1 is all.", _usage),
    ("kv_cache_bytes", "gauge", "Keys and values of requests.", lambda s: s.cache_bytes),
    ("prefix_cache_bytes", "gauge", "Keys and values kept of prompts.", lambda s: s.prefix_bytes),
    (
        "prefix_cache_queries",
        "counter",
        "Tokens of prompts that were looked for.",
        lambda s: s.prefix_query_tokens,
    ),
    (
        "prefix_cache_hits",
        "counter",
        "Tokens of prompts that were found.",
        lambda s: s.prefix_hit_tokens,
    ),
    ("num_preemptions", "counter", "Places in the batch given back.", lambda s: s.preemptions),
    ("spec_decode_num_draft_tokens", "counter", "Tokens guessed.", lambda s: s.draft_tokens),
    (
        "spec_decode_num_accepted_tokens",
        "counter",
        "Tokens guessed right.",
        lambda s: s.accepted_tokens,
    ),
)

_COUNTERS: tuple[tuple[str, str, Callable[[_Model], float]], ...] = (
    ("prompt_tokens", "Tokens of prompts, computed or found.", lambda m: m.prompt_tokens),
    ("generation_tokens", "Tokens generated.", lambda m: m.generation_tokens),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[_Model], Histogram]], ...] = (
    ("time_to_first_token_seconds", "From call to first token.", lambda m: m.first_token),
    (
        "time_per_output_token_seconds",
        "Mean of a request, without its first token.",
        lambda m: m.per_token,
    ),
    ("e2e_request_latency_seconds", "From call to last token.", lambda m: m.latency),
    ("request_queue_time_seconds", "Until a place in the batch was free.", lambda m: m.queue),
    ("request_prompt_tokens", "Tokens of a prompt.", lambda m: m.prompt_length),
    ("request_generation_tokens", "Tokens of an answer.", lambda m: m.answer_length),
)
