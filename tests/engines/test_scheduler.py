"""Whatever the order of submissions, steps and cancellations, every request gets its own text."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lifecycle.engines.base import Event, FinishReason, Request, SamplingParams
from tests.engines.toy import VOCAB, ToyEngine, continuation

CONTEXT, SLOTS, CHUNK = 24, 3, 4

prompts = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=CONTEXT - 1)


class SchedulerMachine(RuleBasedStateMachine):
    """The engine against the plain function that each request should compute."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = ToyEngine.make(SLOTS, CONTEXT, CHUNK)
        self.prompts: dict[str, list[int]] = {}
        self.limits: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.cancelled: set[str] = set()

    @rule(prompt=prompts, max_tokens=st.integers(1, 2 * CONTEXT))
    def submit(self, prompt: list[int], max_tokens: int) -> None:
        id = f"request {len(self.prompts)}"
        self.engine.submit(Request(id, prompt, SamplingParams(max_tokens=max_tokens)))
        self.prompts[id], self.outputs[id] = prompt, []
        self.limits[id] = min(max_tokens, CONTEXT - len(prompt))

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.prompts)))
        if id not in self.ends:
            self.cancelled.add(id)
        self.engine.cancel(id)

    def take(self, events: list[Event]) -> None:
        tokens = [event.request_id for event in events if event.token_id is not None]
        assert len(set(tokens)) == len(tokens), "more than one token of a request in a step"
        for event in events:
            assert event.request_id not in self.ends, "an event after the end"
            if event.token_id is not None:
                self.outputs[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                self.ends[event.request_id] = event.finish_reason

    @invariant()
    def slots_are_few_and_used(self) -> None:
        assert self.engine.num_running <= SLOTS
        if self.engine.backend.steps:
            rows = self.engine.backend.steps[-1]
            assert all(0 <= row.slot < SLOTS for row in rows)
            # A chunk ends at a multiple of the chunk size or with its prompt.
            assert all(row.num_logits or (row.start + len(row.tokens)) % CHUNK == 0 for row in rows)

    def teardown(self) -> None:
        for _ in range(10_000):
            if not (self.engine.num_running or self.engine.num_waiting):
                break
            self.take(self.engine.step())
        self.take(self.engine.step())
        assert self.ends.keys() == self.prompts.keys(), "a request never ended"
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
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


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
        engine.submit(Request(name, [1] * length, SamplingParams(ignore_eos=True)))
    engine.step()
    engine.step()
    first, second = engine.backend.steps
    assert [len(row.tokens) for row in first] == [2, 2]
    # "a" and "b" decode, "c" fills the chunk; "d" would fit later but does not overtake.
    assert [(row.slot, len(row.tokens)) for row in second] == [(0, 1), (1, 1), (2, 4)]


def test_the_lowest_free_slot_is_taken_first() -> None:
    engine = ToyEngine.make(max_num_seqs=3)
    for name in "abc":
        engine.submit(Request(name, [1], SamplingParams(ignore_eos=True)))
    engine.step()
    engine.cancel("b")
    engine.cancel("a")
    engine.submit(Request("d", [1]))
    engine.step()
    assert {row.slot for row in engine.backend.steps[-1]} == {0, 2}
