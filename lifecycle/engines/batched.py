"""Continuous batching over any backend: the scheduler picks, the backend computes, the
samplers choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.backend import Backend, Row
from lifecycle.engines.base import (
    Engine,
    EngineOptions,
    Event,
    FinishReason,
    Generation,
    Request,
    SamplingParams,
)
from lifecycle.engines.limits import check_request, check_tokens
from lifecycle.engines.prefix_cache import CacheCopier, PrefixCache
from lifecycle.engines.sampling import Choice, Sampler, sample
from lifecycle.engines.scheduler import RequestState, Scheduler
from lifecycle.errors import EngineError, RequestError


class BatchedEngine(Engine):
    """An `Engine` over a `Backend`; subclasses only know how to open one."""

    def __init__(
        self,
        backend: Backend,
        *,
        options: EngineOptions,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        long_context: int | None = None,
    ) -> None:
        """Texts of more than `long_context` tokens are long (see `Row.is_long`)."""
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_num_seqs = options.max_num_seqs
        self.eos_token_ids = eos_token_ids
        self._prefill_chunk = options.prefill_chunk
        self._long_context = long_context
        self._backend = backend
        self._scheduler = Scheduler(options.max_num_seqs, options.prefill_chunk)
        self._prefixes: PrefixCache | None = None
        if options.prefix_cache_bytes and isinstance(backend, CacheCopier):
            budget, chunk = options.prefix_cache_bytes, options.prefill_chunk
            self._prefixes = PrefixCache(budget, chunk, backend)
        self._adapters: dict[str, int] = {}
        self._cancelled: list[Event] = []
        self._is_open = True

    def submit(self, request: Request) -> None:
        self._require_open()
        # The end of a cancelled request is yet to be told; until then its id means that one.
        is_ending = any(event.request_id == request.id for event in self._cancelled)
        if is_ending or request.id in self._scheduler:
            raise RequestError(f"the request id {request.id!r} is in use")
        self._scheduler.add(self._state(request))

    def cancel(self, request_id: str) -> None:
        if request_id in self._scheduler:
            self._cancelled.append(self._end(request_id, FinishReason.CANCELLED))

    def step(self) -> list[Event]:
        events, self._cancelled = self._cancelled, []
        prefixes = self._prefixes
        batch = self._scheduler.schedule(prefixes.reuse if prefixes is not None else None)
        if not batch:
            return events
        try:
            logits = self._backend.forward([row for _, row in batch])
        except EngineError as error:
            failed = [state.request.id for state, _ in batch]
            return events + [self._end(id, FinishReason.ERROR, str(error)) for id in failed]
        for state, row in batch:
            state.num_computed += len(row.tokens)
            if prefixes is not None:
                prefixes.keep(state, row)
        ready = [state for state, row in batch if row.num_logits]
        choices = sample(logits, [state.sampler for state in ready])
        return events + [self._advance(*pair) for pair in zip(ready, choices, strict=True)]

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """What is kept of prompts, if anything is."""
        return self._prefixes

    def load_adapter(self, name: str, folder: Path) -> None:
        self._require_open()
        if name in self._adapters:
            raise EngineError(f"there is an adapter '{name}' already: unload it first")
        self._adapters[name] = self._backend.load_adapter(folder)

    def unload_adapter(self, name: str) -> None:
        self._require_open()
        slot = self.adapter_slot(name)
        if users := sum(state.adapter == slot for state in self._scheduler.states()):
            raise EngineError(f"adapter '{name}' is used by {users} requests")
        self._backend.unload_adapter(slot)
        del self._adapters[name]
        if self._prefixes is not None:
            # Another adapter may get this slot.
            self._prefixes.clear()

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        self._require_idle()
        slot = self.adapter_slot(adapter)
        tokens = check_tokens(token_ids, most=self.max_model_len, vocab_size=self.vocab_size)
        result = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        for start in range(0, len(tokens), self._prefill_chunk):
            chunk = tokens[start : start + self._prefill_chunk]
            row = Row(0, start, chunk, len(chunk), self.is_long(tokens), slot)
            result[start : start + len(chunk)] = self._backend.forward([row])
        return result

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """What the backend makes of rows (see `Backend.forward`), past scheduler and sampling:
        for gates that feed a model in ways that no request does. The engine must be idle."""
        self._require_idle()
        return self._backend.forward(rows)

    def is_long(self, tokens: Sequence[int]) -> bool:
        """What `Row.is_long` must be for the rows of a text."""
        return self._long_context is not None and len(tokens) > self._long_context

    def adapter_slot(self, name: str | None) -> int:
        """The slot of a loaded adapter, as in `Row.adapter`; 0 for none.

        Raises:
            EngineError: none of this name is loaded.
        """
        if name is None:
            return 0
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise EngineError(f"no adapter '{name}' is loaded (loaded: {known})")
        return self._adapters[name]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        self._require_idle()
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        pairs = zip(prompts, params, strict=True)
        requests = [Request(str(index), *pair) for index, pair in enumerate(pairs)]
        for state in [self._state(request) for request in requests]:
            self._scheduler.add(state)
        try:
            return self._run(len(prompts), on_done)
        finally:
            for request in requests:
                self._scheduler.remove(request.id)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._scheduler = Scheduler(self.max_num_seqs, self._prefill_chunk)
            self._cancelled = []
            self._prefixes = None
            self._backend.close()

    def _run(self, total: int, on_done: Callable[[int, int], None] | None) -> list[Generation]:
        """Step until the requests "0" to "total - 1" have ended."""
        tokens: list[list[int]] = [[] for _ in range(total)]
        logprobs: list[list[float]] = [[] for _ in range(total)]
        ends: dict[int, FinishReason] = {}
        while len(ends) < total:
            for event in self.step():
                index = int(event.request_id)
                if event.finish_reason is FinishReason.ERROR:
                    raise EngineError(f"prompt {index}: {event.error}")
                if event.token_id is not None:
                    tokens[index].append(event.token_id)
                if event.logprob is not None:
                    logprobs[index].append(event.logprob)
                if event.finish_reason is not None:
                    ends[index] = event.finish_reason
                    if on_done is not None:
                        on_done(len(ends), total)
        return [Generation(tuple(tokens[i]), ends[i], tuple(logprobs[i])) for i in range(total)]

    def _state(self, request: Request) -> RequestState:
        request = check_request(
            request, max_model_len=self.max_model_len, vocab_size=self.vocab_size
        )
        params = request.params
        ends = params.stop_token_ids
        if not params.ignore_eos:
            ends |= self.eos_token_ids
        sampler = Sampler(params, request.prompt, self.vocab_size, ends)
        tokens, count = list(request.prompt), len(request.prompt)
        try:
            slot = self.adapter_slot(request.adapter)
        except EngineError as error:
            raise RequestError(str(error)) from None
        is_long = self.is_long(tokens)
        return RequestState(request, sampler, tokens, count, count, is_long=is_long, adapter=slot)

    def _advance(self, state: RequestState, choice: Choice | None) -> Event:
        """Give a request its next token, and end it if that is the last."""
        id, params = state.request.id, state.request.params
        if choice is None:
            return self._end(
                id,
                FinishReason.ERROR,
                "the model's output is not a finite number, or no token may come",
            )
        token = choice.token_id
        cached = state.num_cached if len(state.tokens) == state.num_prompt else 0
        is_eos = token in self.eos_token_ids and not params.ignore_eos
        if is_eos or token in params.stop_token_ids:
            return self._end(id, FinishReason.STOP)._replace(cached_tokens=cached)
        state.tokens.append(token)
        num_generated = len(state.tokens) - state.num_prompt
        is_full = num_generated >= params.max_tokens or len(state.tokens) >= self.max_model_len
        reason: FinishReason | None
        if num_generated >= params.min_tokens and any(
            len(end) <= num_generated and tuple(state.tokens[-len(end) :]) == end
            for end in params.stop_sequences
        ):
            reason = FinishReason.STOP
        else:
            reason = FinishReason.LENGTH if is_full else None
        if reason is not None:
            self._scheduler.remove(id)
        elif not state.is_long and self.is_long(state.tokens):
            # All that is in the cache was rotated as in a short text.
            state.is_long = True
            state.recompute()
        return Event(id, token, choice.logprob, choice.top_logprobs, reason, cached_tokens=cached)

    def _end(self, request_id: str, reason: FinishReason, error: str = "") -> Event:
        self._scheduler.remove(request_id)
        return Event(request_id, finish_reason=reason, error=error)

    def _require_open(self) -> None:
        if not self._is_open:
            raise EngineError("the engine is closed")

    def _require_idle(self) -> None:
        self._require_open()
        if self.num_running or self.num_waiting or self._cancelled:
            raise EngineError("the engine is busy; call step() until every request has ended")
