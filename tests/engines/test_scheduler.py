"""Whatever the order of submissions, steps and cancellations, every request gets its own text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lifecycle.engines import scheduler
from lifecycle.engines.draft_model import Draft
from lifecycle.engines.line import WaitingLine
from lifecycle.engines.requests import Event, FinishReason, Request, SamplingParams
from lifecycle.engines.sampling import Sampler
from lifecycle.engines.state import GRAIN, RequestState
from lifecycle.errors import EngineError
from tests.engines.clock import StepClock
from tests.engines.toy import VOCAB, ToyBackend, ToyEngine, continuation

CONTEXT, SLOTS, CHUNK = 24, 3, 4
BYTES = ToyBackend.bytes_per_token
FREE = SamplingParams(max_tokens=5, ignore_eos=True)

# Few different tokens make prompts that begin alike, and repeat themselves.
prompts = st.lists(st.integers(1, 3), min_size=1, max_size=CONTEXT - 1) | st.lists(
    st.integers(1, VOCAB - 1), min_size=1, max_size=CONTEXT - 1
)
engines = st.fixed_dictionaries(
    {
        "kv_cache_bytes": st.none()
        | st.integers(CONTEXT, SLOTS * CONTEXT).map(lambda n: n * BYTES),
        "prefix_cache_bytes": st.sampled_from([0, 3 * CHUNK * BYTES, 100 * CHUNK * BYTES]),
        "draft_tokens": st.sampled_from([0, 1, 5]),
        "long_context": st.none() | st.integers(4, CONTEXT),
    }
)
drafts = st.none() | st.fixed_dictionaries(
    {
        "agreement": st.sampled_from([0.0, 0.5, 1.0]),
        "max_model_len": st.integers(CONTEXT // 2, CONTEXT),
        "long_context": st.none() | st.integers(4, CONTEXT),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """The engine against the plain function that each request should compute."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: dict[str, list[int]] = {}
        self.limits: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.cancelled: set[str] = set()
        self.patch = pytest.MonkeyPatch()

    @initialize(
        options=engines,
        draft=drafts,
        token=st.sampled_from([0.0, 0.2, 2.0]),
        copy=st.sampled_from([0.0, 3.0, 10.0]),
    )
    def open(
        self, options: dict[str, Any], draft: dict[str, Any] | None, token: float, copy: float
    ) -> None:
        self.guesser: ToyBackend | None = None
        if draft is not None:
            self.guesser = ToyBackend(draft.pop("agreement"))
            options = {**options, "draft": Draft(self.guesser, **draft)}
        # A step in which others decode copies any number of parts, or two, or one.
        self.patch.setattr(scheduler, "_PART", 2 * BYTES)
        self.engine = ToyEngine.make(SLOTS, CONTEXT, CHUNK, **options)
        # Tokens that cost little are guessed, those that cost much are held back.
        clock = StepClock(self.patch)
        clock.times(self.engine.backend, 1.0, token)
        clock.copies(self.engine.backend, copy)
        if self.guesser is not None:
            clock.times(self.guesser, 0.1)
        # Without a budget as much as the slots hold may be aside.
        budget = options["kv_cache_bytes"]
        self.most = 2 * SLOTS * CONTEXT if budget is None else budget // BYTES

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 2 * CONTEXT),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("ab"),
        copies=st.sampled_from([1, 1, 3]),
    )
    def submit(
        self, prompt: list[int], max_tokens: int, priority: int, tenant: str, copies: int
    ) -> None:
        for _ in range(copies):
            id = f"request {len(self.prompts)}"
            params = SamplingParams(max_tokens=max_tokens)
            self.engine.submit(Request(id, prompt, params, priority=priority, tenant=tenant))
            self.prompts[id], self.outputs[id] = prompt, []
            self.limits[id] = min(max_tokens, CONTEXT - len(prompt))

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())

    @precondition(lambda self: self.engine.num_running == SLOTS)
    @rule(prompt=prompts, count=st.integers(0, 5))
    def urge(self, prompt: list[int], count: int) -> None:
        """One comes for which another has to leave its slot."""
        self.submit(prompt, 2 * CONTEXT, priority=-len(self.prompts), tenant="a", copies=1)
        self.step(count)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.prompts)))
        if id not in self.ends:
            self.cancelled.add(id)
        self.engine.cancel(id)

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.request_id not in self.ends, "an event after the end"
            if event.token_id is not None:
                self.outputs[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                self.ends[event.request_id] = event.finish_reason

    @invariant()
    def slots_are_few_and_used(self) -> None:
        assert self.engine.num_running <= SLOTS
        assert self.engine.stats.cache_tokens <= self.most
        if self.engine.backend.steps:
            rows = self.engine.backend.steps[-1]
            assert all(0 <= row.slot < SLOTS for row in rows)
            # A piece of a prompt ends where the bits stay the same, or with the prompt.
            assert all(row.num_logits or (row.start + len(row.tokens)) % GRAIN == 0 for row in rows)

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.patch.undo()

    def finish(self) -> None:
        for _ in range(10_000):
            if not (self.engine.num_running or self.engine.num_waiting):
                break
            self.take(self.engine.step())
        self.take(self.engine.step())
        assert self.ends.keys() == self.prompts.keys(), "a request never ended"
        assert self.engine.stats.cache_tokens == 0
        assert not self.engine.backend.texts, "a slot was not given back"
        assert self.guesser is None or not self.guesser.texts, "the draft model keeps a text"
        for id, prompt in self.prompts.items():
            whole = continuation(prompt, self.limits[id])
            output, reason = self.outputs[id], self.ends[id]
            if id in self.cancelled:
                assert reason is FinishReason.CANCELLED and output == whole[: len(output)]
            else:
                full = len(whole) == self.limits[id]
                assert output == whole
                assert reason is (FinishReason.LENGTH if full else FinishReason.STOP)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def run(engine: ToyEngine) -> list[Event]:
    events: list[Event] = []
    while engine.num_running or engine.num_waiting:
        events += engine.step()
    return events


def test_requests_start_in_the_order_they_came() -> None:
    engine = ToyEngine.make(max_num_seqs=2)
    for name in "abcd":
        engine.submit(Request(name, [1] * 3, SamplingParams(max_tokens=1)))
    ends = [event.request_id for event in run(engine) if event.finish_reason]
    assert ends == ["a", "b", "c", "d"]


def test_decoding_requests_get_a_token_in_every_step_beside_a_long_prompt() -> None:
    engine = ToyEngine.make(max_model_len=200)
    engine.submit(Request("short", [3], SamplingParams(max_tokens=150, ignore_eos=True)))
    engine.step()
    engine.submit(Request("long", [5] * 100))
    for _ in range(100 // 4):
        assert engine.step()[0].request_id == "short"


def test_a_step_carries_one_chunk_of_prompts_and_short_ones_share_it() -> None:
    engine = ToyEngine.make(max_num_seqs=4, prefill_chunk=4)
    for name, length in (("a", 2), ("b", 2), ("c", 6), ("d", 1)):
        prompt = [ord(name) % VOCAB] * length
        engine.submit(Request(name, prompt, SamplingParams(ignore_eos=True)))
    engine.step()
    engine.step()
    first, second = engine.backend.steps
    assert [len(row.tokens) for row in first] == [2, 2]
    # "a" and "b" decode, "c" fills the chunk; "d" would fit later but does not overtake.
    assert [(row.slot, len(row.tokens)) for row in second] == [(0, 1), (1, 1), (2, 4)]


def test_the_lowest_free_slot_is_taken_first() -> None:
    engine = ToyEngine.make(max_num_seqs=3)
    for name in "abc":
        engine.submit(Request(name, [ord(name) % VOCAB], SamplingParams(ignore_eos=True)))
    engine.step()
    engine.cancel("b")
    engine.cancel("a")
    engine.submit(Request("d", [1]))
    engine.step()
    assert {row.slot for row in engine.backend.steps[-1]} == {0, 2}


def test_a_lower_priority_number_takes_a_slot_and_the_other_goes_on_where_it_was() -> None:
    engine = ToyEngine.make(max_num_seqs=1, max_model_len=40)
    engine.submit(
        Request("late", [3] * 6, SamplingParams(max_tokens=8, ignore_eos=True), priority=1)
    )
    for _ in range(4):
        engine.step()
    engine.submit(Request("soon", [5] * 6, SamplingParams(max_tokens=2, ignore_eos=True)))
    engine.submit(
        Request("later", [7] * 6, SamplingParams(max_tokens=2, ignore_eos=True), priority=2)
    )
    ends = [event.request_id for event in run(engine) if event.finish_reason]
    assert ends == ["soon", "late", "later"]
    assert engine.stats.preemptions == 1
    # Its part of the cache was put aside: no token of it was computed twice.
    computed = sum(len(row.tokens) for rows in engine.backend.steps for row in rows)
    assert computed == 3 * 6 + 7 + 1 + 1


def test_tenants_take_turns_however_many_requests_one_has() -> None:
    engine = ToyEngine.make(max_num_seqs=1)
    for n in range(6):
        engine.submit(
            Request(f"many {n}", [1 + n] * 4, SamplingParams(max_tokens=2), tenant="many")
        )
    engine.step()
    for n in range(2):
        engine.submit(Request(f"few {n}", [9 + n] * 4, SamplingParams(max_tokens=2), tenant="few"))
    ends = [event.request_id for event in run(engine) if event.finish_reason]
    assert ends[:4] == ["many 0", "few 0", "many 1", "few 1"] or ends[:3] == [
        "many 0",
        "few 0",
        "few 1",
    ]


def test_a_full_cache_sends_back_what_came_last() -> None:
    # Room for one context and a bit.
    engine = ToyEngine.make(3, 24, 4, kv_cache_bytes=26 * BYTES)
    for n in range(3):
        params = SamplingParams(max_tokens=14, ignore_eos=True)
        engine.submit(Request(str(n), [1 + n] * 5, params))
    ends: list[str] = []
    while engine.num_running or engine.num_waiting:
        ends += [event.request_id for event in engine.step() if event.finish_reason]
        assert engine.stats.cache_tokens <= 26
    assert ends == ["0", "1", "2"]
    assert engine.stats.preemptions > 0


def test_a_cache_for_less_than_one_context_is_refused() -> None:
    with pytest.raises(EngineError, match=r"kv_cache_bytes is 184; one context of 24 .* takes 192"):
        ToyEngine.make(3, 24, 4, kv_cache_bytes=23 * BYTES)


def test_a_request_ends_when_its_time_is_over() -> None:
    engine = ToyEngine.make(max_num_seqs=1, max_model_len=200)
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    engine.submit(Request("runs", [3], long, timeout=0.0))
    engine.submit(Request("waits", [4], long, timeout=0.0))
    engine.submit(Request("stays", [5], SamplingParams(max_tokens=3, ignore_eos=True), timeout=600))
    ends = {event.request_id: event.finish_reason for event in run(engine) if event.finish_reason}
    assert ends == {
        "runs": FinishReason.TIMEOUT,
        "waits": FinishReason.TIMEOUT,
        "stays": FinishReason.LENGTH,
    }


def test_equal_prompts_are_computed_once() -> None:
    engine = ToyEngine.make(max_num_seqs=3, max_model_len=40)
    for n in range(3):
        params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=1.0, seed=n)
        engine.submit(Request(str(n), [1, 2, 3, 4, 5, 6, 7], params))
    cached = {event.request_id: event.cached_tokens for event in run(engine) if event.cached_tokens}
    assert cached == {"1": 7, "2": 7}
    assert engine.stats.prompt_tokens == 7


def test_a_text_that_repeats_itself_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(draft_tokens: int) -> tuple[list[int], int]:
        engine = ToyEngine.make(1, 200, 16, draft_tokens=draft_tokens)
        StepClock(monkeypatch).times(engine.backend, 0.02, 0.002)
        # One logit is raised that far that it always wins.
        params = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={7: 100.0})
        engine.submit(Request("r", [7, 7, 7, 7], params))
        found = [e.token_id for e in run(engine) if e.token_id is not None]
        return found, len(engine.backend.steps)

    assert steps(0) == ([7] * 60, 60)
    found, count = steps(5)
    assert found == [7] * 60
    assert count < 20


def test_a_prompt_that_is_being_scored_is_shared_only_when_it_is_finished() -> None:
    engine = ToyEngine.make(3, 24, 4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    scored = SamplingParams(max_tokens=3, prompt_logprobs=0)
    engine.submit(Request("scored", prompt, scored))
    engine.submit(Request("twin", prompt, SamplingParams(max_tokens=3)))
    found: dict[str, list[int]] = {"scored": [], "twin": []}
    for event in run(engine):
        if event.token_id is not None:
            found[event.request_id].append(event.token_id)
    assert found["scored"] == found["twin"] == continuation(prompt, 3)


def test_what_is_found_twice_is_told_once() -> None:
    engine = ToyEngine.make(2, 24, 4, kv_cache_bytes=26 * BYTES, prefix_cache_bytes=100 * BYTES)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.generate([[1] * 9], params)
    engine.submit(Request("leaves", [1] * 18, params, priority=1))
    engine.step()
    # There is a slot for it, but no room: the other one begins again, and finds what it found and
    # computed.
    engine.submit(Request("comes", [2] * 10, params))
    cached = [event.cached_tokens for event in run(engine) if event.request_id == "leaves"]
    assert engine.stats.preemptions == 1
    assert cached == [12, 0]


@total_ordering
@dataclass
class Place:
    """A place in the order of arrival."""

    number: int
    compared: ClassVar[int] = 0
    """How often two places were compared."""

    def __lt__(self, other: Place) -> bool:
        Place.compared += 1
        return self.number < other.number


def test_who_enters_a_line_is_compared_with_its_end_only() -> None:
    line, sampler, count = WaitingLine(), Sampler(FREE, [1], VOCAB), 1000
    Place.compared = 0
    for n in range(count):
        state = RequestState(Request(str(n), [1]), sampler, [1], 1, 1)
        state.order = Place(n)  # type: ignore[assignment]
        line.enter(state)
    assert [state.request.id for state in line] == [str(n) for n in range(count)]
    assert 0 < Place.compared <= 2 * count


def test_a_request_that_comes_back_stands_where_it_came() -> None:
    engine = ToyEngine.make(max_num_seqs=2, max_model_len=40)
    for name in "abcd":
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        engine.submit(Request(name, [ord(name) % VOCAB] * 3, params, priority=1))
    engine.step()
    for name in "xy":
        engine.submit(Request(name, [3], SamplingParams(max_tokens=2, ignore_eos=True)))
    engine.step()
    assert engine.num_waiting == 4
    ends = [event.request_id for event in run(engine) if event.finish_reason]
    assert ends == ["x", "y", "a", "b", "c", "d"]


def test_deadlines_that_were_met_are_forgotten() -> None:
    engine = ToyEngine.make()
    engine.submit(Request("stays", [1], SamplingParams(max_tokens=20, ignore_eos=True), timeout=60))
    for n in range(100):
        engine.submit(Request(str(n), [1], SamplingParams(max_tokens=1), timeout=600))
        engine.cancel(str(n))
        engine.step()
    assert len(engine._deadlines) < 30  # pyright: ignore[reportPrivateUsage]
    engine.submit(Request("late", [1], timeout=0.0))
    ends = {event.request_id: event.finish_reason for event in run(engine) if event.finish_reason}
    assert ends["late"] is FinishReason.TIMEOUT
