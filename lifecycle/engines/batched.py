"""Continuous batching over any backend: the scheduler picks, the backend computes, the
samplers choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines import offline
from lifecycle.engines.adapter_table import AdapterTable
from lifecycle.engines.backend import Backend, CacheBackend, Row
from lifecycle.engines.base import AdapterWeights, Engine, EngineOptions, StrPath
from lifecycle.engines.beam_slots import run_searches
from lifecycle.engines.beams import Beam, BeamParams, start_searches
from lifecycle.engines.deadlines import Deadlines
from lifecycle.engines.draft_model import Draft, DraftModel
from lifecycle.engines.embeddings import Pooling, check_texts, embed_texts
from lifecycle.engines.limits import cache_limit, check_request, check_tokens
from lifecycle.engines.pace import EVERY, Pace
from lifecycle.engines.prefix_cache import PrefixCache
from lifecycle.engines.progress import Progress, failed
from lifecycle.engines.requests import (
    Event,
    FinishReason,
    Generation,
    Request,
    SamplingParams,
    Score,
)
from lifecycle.engines.sampling import NUMPY, Passes, Sampler, Scan
from lifecycle.engines.scheduler import Batch, Scheduler
from lifecycle.engines.slot_room import SlotRoom
from lifecycle.engines.speculation import Speculation
from lifecycle.engines.state import RequestState
from lifecycle.engines.stats import EngineStats
from lifecycle.engines.windows import ALL_SEEN, Windows
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
        windows: Windows = ALL_SEEN,
        has_prompt_graph: bool = False,
        cuts_freely: bool = False,
        draft: Draft | None = None,
        passes: Passes = NUMPY,
    ) -> None:
        """
        Args:
            long_context: texts of more tokens are long (see `Row.is_long`).
            windows: what the layers look back on.
            has_prompt_graph: whether `backend` computes the tokens of prompts by a graph of their own.
            cuts_freely: whether a token gets the same bits from `backend` however its text is cut.
            draft: a model that guesses; with one, `backend` can roll back.
            passes: how logits are scanned and drawn from.
        """
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_num_seqs = options.max_num_seqs
        self.eos_token_ids = eos_token_ids
        self._options = options
        self._backend = backend
        self._passes = passes
        self._cache = backend if isinstance(backend, CacheBackend) else None
        self._windows = windows
        self._progress = Progress(eos_token_ids, max_model_len, long_context)
        every = EVERY if draft is None else 1
        self._pace = Pace(options.max_stall, has_prompt_graph=has_prompt_graph, every=every)
        if not backend.can_roll_back:
            options = replace(options, draft_tokens=0)
        self._speculation = Speculation(options, max_model_len, draft and DraftModel(draft))
        self._prefixes: PrefixCache | None = None
        if options.prefix_cache_bytes and self._cache is not None:
            budget, chunk = options.prefix_cache_bytes, options.prefill_chunk
            self._prefixes = PrefixCache(
                budget, chunk, self._cache, cuts_freely=cuts_freely, window=windows.narrowest
            )
        self._max_cache_tokens = cache_limit(options, max_model_len, self._cache, windows)
        self._scheduler = self._make_scheduler()
        self._deadlines = Deadlines(self._scheduler)
        self._adapters = AdapterTable(backend, lambda: self._scheduler.states())
        self._cancelled: list[Event] = []
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._is_open = True

    def submit(self, request: Request) -> None:
        self._require_open()
        # The end of a cancelled request is yet to be told; until then its id means that one.
        is_ending = any(event.request_id == request.id for event in self._cancelled)
        if is_ending or request.id in self._scheduler:
            raise RequestError(f"the request id {request.id!r} is in use")
        self._add(self._state(request))

    def cancel(self, request_id: str) -> None:
        if (state := self._scheduler.find(request_id)) is not None:
            self._scheduler.remove(state)
            self._cancelled.append(Event(request_id, finish_reason=FinishReason.CANCELLED))

    def step(self) -> list[Event]:
        events, self._cancelled = self._cancelled + self._expired(), []
        batch: Batch = []
        try:
            batch = self._schedule()
            if not batch:
                return events
            begun = time.perf_counter()
            logits = self._backend.forward([row for _, row in batch])
            self._account(batch, time.perf_counter() - begun)
            found = self._passes.scan(logits)
        except (EngineError, MemoryError) as error:
            # Before there are rows, nobody knows whose they would have been.
            running = list(self._scheduler.running.values())
            concerned = [s for s, _ in batch] or running or list(self._scheduler.states())
            self._scheduler.drop(concerned)
            return events + [failed(s, str(error) or "no memory for the step") for s in concerned]
        # See `choose`; entering this takes longer than choosing a token.
        with np.errstate(over="ignore"):
            return events + self._tell_all(batch, found)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def stats(self) -> EngineStats:
        cache, prefixes = self._cache, self._prefixes
        tokens, per_token = self._scheduler.cache_tokens, cache.bytes_per_token if cache else 0
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            cache_tokens=round(tokens),
            cache_bytes=round(tokens * per_token),
            cache_capacity_bytes=per_token * self._max_cache_tokens,
            prefix_bytes=prefixes.num_bytes if prefixes else 0,
            prefix_hit_tokens=prefixes.hit_tokens if prefixes else 0,
            prefix_query_tokens=prefixes.query_tokens if prefixes else 0,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._scheduler.num_preemptions,
            draft_tokens=self._speculation.guessed,
            accepted_tokens=self._speculation.right,
            draft_cache_bytes=self._speculation.cache_bytes,
        )

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """What is kept of prompts, if anything is."""
        return self._prefixes

    def read_adapter(self, folder: StrPath) -> AdapterWeights:
        return self._backend.read_adapter(Path(folder))

    def load_adapter(
        self,
        name: str,
        adapter: StrPath | AdapterWeights,
        *,
        replace: bool = False,
        evict: Collection[str] = (),
    ) -> None:
        self._require_open()
        weights = self.read_adapter(adapter) if isinstance(adapter, StrPath) else adapter
        self._adapters.load(name, weights, replace=replace, evict=evict)

    def unload_adapter(self, name: str) -> None:
        self._require_open()
        self._adapters.unload(name)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters.names

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        self._require_idle()
        number = self.adapter_number(adapter)
        tokens = check_tokens(token_ids, most=self.max_model_len, vocab_size=self.vocab_size)
        result = np.empty((len(tokens), self.vocab_size), dtype=np.float32)
        for start in range(0, len(tokens), self._options.prefill_chunk):
            chunk = tokens[start : start + self._options.prefill_chunk]
            row = Row(0, start, chunk, len(chunk), self.is_long(tokens), number)
            result[start : start + len(chunk)] = self._backend.forward([row])
        return result

    def forward(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """What the backend makes of rows (see `Backend.forward`), past scheduler and sampling:
        for gates that feed a model in ways that no request does. The engine must be idle."""
        self._require_idle()
        return self._backend.forward(rows)

    def is_long(self, tokens: Sequence[int]) -> bool:
        """What `Row.is_long` must be for the rows of a text."""
        return self._progress.is_long(len(tokens))

    def adapter_number(self, name: str | None) -> int:
        """The number of a loaded adapter, as in `Row.adapter`; 0 for none.

        Raises:
            EngineError: none of this name is loaded.
        """
        return 0 if name is None else self._adapters.number(name)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_done: Callable[[int, int], None] | None = None,
        adapter: str | None = None,
    ) -> list[Generation]:
        self._require_idle()
        # Nobody reads along, so no token has to come soon.
        self._pace.max_stall = None
        try:
            return offline.generate(self, prompts, params, on_done, adapter)
        finally:
            self._pace.max_stall = self._options.max_stall

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        self._require_idle()
        return offline.score(self, pairs, on_done)

    def beam_search(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        beams: BeamParams | None = None,
        adapter: str | None = None,
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[list[Beam]]:
        self._require_idle()
        beams = beams or BeamParams()
        searches = start_searches(self, prompts, params, beams)
        run_searches(searches, beams.num_beams, self._room(adapter), on_done)
        return [search.finished for search in searches]

    def embed(
        self,
        prompts: Sequence[Sequence[int]],
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> NDArray[np.float32]:
        self._require_idle()
        texts = check_texts(prompts, most=self.max_model_len, vocab_size=self.vocab_size)
        return embed_texts(texts, pooling, normalize, self._room())

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._cancelled = []
            self._prefixes = self._cache = None
            self._scheduler = self._make_scheduler()
            self._deadlines = Deadlines(self._scheduler)
            self._speculation.close()
            self._backend.close()

    def _room(self, adapter: str | None = None) -> SlotRoom:
        """All slots, for work past the scheduler."""
        return SlotRoom(
            self._backend,
            num_slots=self.max_num_seqs,
            max_tokens=self._max_cache_tokens,
            chunk=self._options.prefill_chunk,
            is_long=self._progress.is_long,
            adapter=self.adapter_number(adapter),
        )

    def _state(self, request: Request) -> RequestState:
        request = check_request(
            request, max_model_len=self.max_model_len, vocab_size=self.vocab_size
        )
        params = request.params
        ends = params.stop_token_ids | (set[int]() if params.ignore_eos else self.eos_token_ids)
        size, constraint = self.vocab_size, request.constraint
        sampler = Sampler(params, request.prompt, size, ends, constraint, self._passes)
        tokens, count = list(request.prompt), len(request.prompt)
        try:
            adapter = self.adapter_number(request.adapter)
        except EngineError as error:
            raise RequestError(str(error)) from None
        state = RequestState(
            request, sampler, tokens, count, count, is_long=self.is_long(tokens), adapter=adapter
        )
        state.twin_key = hash(tuple(tokens))
        return state

    def _add(self, state: RequestState) -> None:
        state.arrived = time.monotonic()
        self._scheduler.add(state)
        if self._prefixes is not None:
            self._prefixes.query_tokens += state.num_prompt
        if state.request.timeout is not None:
            state.deadline = state.arrived + state.request.timeout
            self._deadlines.add(state)

    def _make_scheduler(self) -> Scheduler:
        return Scheduler(
            self.max_num_seqs,
            self._options.prefill_chunk,
            cache=self._cache,
            max_cache_tokens=self._max_cache_tokens if self._options.kv_cache_bytes else inf,
            max_aside_tokens=self._max_cache_tokens,
            windows=self._windows,
            reuse=self._prefixes and self._prefixes.reuse,
            on_release=self._speculation.release,
        )

    def _schedule(self) -> Batch:
        self._scheduler.admit()
        pace, seen = self._pace, self._scheduler.seen_tokens()
        left = seconds = pace.copy_seconds(len(seen)) if seen else None
        if self._scheduler.is_copying:
            left = self._scheduler.copy(seconds, pace.stall_seconds(len(seen)) if seen else None)
            seen = self._scheduler.seen_tokens()
        pace.context = sum(seen)
        self._speculation.draft(self._scheduler.active(), pace)
        room = pace.prompt_room(len(seen)) if seen else None
        return self._scheduler.schedule(room, seconds, left)

    def _account(self, batch: Batch, seconds: float) -> None:
        """Take note of what a step has computed."""
        num_prompt = num_all = 0
        for state, row in batch:
            count = len(row.tokens)
            num_all += count
            num_prompt += count if state.is_prefilling else 0
            state.num_computed += count - len(state.draft)
            self._scheduler.waiting.serve(state.request.tenant, count)
            if self._prefixes is not None:
                self._prefixes.keep(state, row)
            self._scheduler.forget_old(state)
        self._steps += 1
        self._prompt_tokens += num_prompt
        # Of the step before: prompts that are scored come in pieces that are alike.
        seconds += self._progress.take_score_seconds() * (num_prompt > 0)
        self._speculation.note(self._pace, num_all - num_prompt, num_prompt, seconds)

    def _tell_all(self, batch: Batch, rows: Scan) -> list[Event]:
        """What the requests of a step get from its logits."""
        events, start = list[Event](), 0
        for state, row in batch:
            end = start + row.num_logits
            if end > start:
                # A twin that ends with its first token needs no copy of what the other may leave now.
                twins, told = self._scheduler.share(state), list[Event]()
                for twin in twins:
                    told += self._tell(twin, rows, end - 1, end)
                events += self._tell(state, rows, start, end) + told
            start = end
        return events

    def _tell(self, state: RequestState, rows: Scan, start: int, end: int) -> list[Event]:
        try:
            events = self._progress.advance(state, rows, start, end)
        except MemoryError:
            events = [failed(state, "no memory to choose a token")]
        for event in events:
            self._generated_tokens += event.token_id is not None
        if events and events[-1].finish_reason is not None:
            self._scheduler.remove(state)
        return events

    def _expired(self) -> list[Event]:
        """End the requests whose time is over."""
        late = self._deadlines.met(time.monotonic()) if self._deadlines else []
        for state in late:
            self._scheduler.remove(state)
        return [Event(state.request.id, finish_reason=FinishReason.TIMEOUT) for state in late]

    def _require_open(self) -> None:
        if not self._is_open:
            raise EngineError("the engine is closed")

    def _require_idle(self) -> None:
        self._require_open()
        if self.num_running or self.num_waiting or self._cancelled:
            raise EngineError("the engine is busy; call step() until every request has ended")
