"""Requests with a constraint in the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.grammar.compiler import Grammar, GrammarCompiler
from lifecycle.engines.grammar.spec import GrammarSpec
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Event, FinishReason, Request, SamplingParams
from lifecycle.engines.state import LONGEST_RUN
from lifecycle.errors import RequestError
from tests.engines.clock import StepClock
from tests.engines.conftest import Model
from tests.engines.grammars import PERSON, compiler_of, encode
from tests.engines.toy import EOS, VOCAB, ToyEngine

END = 2


class Recital:
    """A `Constraint` that allows one text; `run` of it are forced at once after each choice."""

    def __init__(self, text: Sequence[int], run: int = 0, fail_at: int | None = None) -> None:
        self.text, self.run, self.fail_at, self.place = list(text), run, fail_at, 0

    def mask(self) -> NDArray[np.bool_]:
        if self.place == self.fail_at:
            raise RequestError("the grammar is too large")
        mask = np.zeros(VOCAB, np.bool_)
        mask[self.text[self.place]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self.text[self.place]
        self.place += 1

    def forced(self) -> Sequence[int]:
        return self.text[self.place : self.place + self.run]

    @property
    def is_complete(self) -> bool:
        return self.place == len(self.text)


def finish(engine: Engine, *requests: Request) -> dict[str, list[Event]]:
    """The events of requests that run together."""
    found: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            found[event.request_id].append(event)
    return found


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def test_forced_tokens_take_no_step() -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    engine = ToyEngine.make()
    constraint = Recital(text, run=3)
    events = finish(engine, Request("a", [7], constraint=constraint))["a"]
    assert tokens_of(events) == text
    assert [event.finish_reason for event in events] == [None] * 7 + [FinishReason.STOP]
    assert engine.stats.steps == 2
    # What was forced is computed with the token after it, and nothing twice.
    assert [row.tokens for rows in engine.backend.steps for row in rows] == [[7], text[:4]]


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_a_long_run_is_computed_piece_by_piece(draft_tokens: int) -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6] * 12
    engine = ToyEngine.make(max_model_len=120, draft_tokens=draft_tokens)
    neighbour = SamplingParams(max_tokens=100, ignore_eos=True)
    found = finish(
        engine, Request("a", [7], constraint=Recital(text, run=90)), Request("b", [8], neighbour)
    )
    assert tokens_of(found["a"]) == text and len(tokens_of(found["b"])) == 100
    rows = [row for rows in engine.backend.steps for row in rows if row.slot == 0]
    assert LONGEST_RUN <= max(len(row.tokens) for row in rows) <= LONGEST_RUN + draft_tokens
    if not draft_tokens:
        computed = [token for row in rows for token in row.tokens]
        assert computed == [7, *text[:-LONGEST_RUN]], (
            "each is computed once, but for those that nothing follows"
        )


def test_what_is_forced_is_told_as_it_is_computed() -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6] * 12
    engine = ToyEngine.make(max_model_len=120)
    engine.submit(Request("a", [7], constraint=Recital(text, run=90)))
    told: list[int] = []
    while engine.num_running or engine.num_waiting:
        told.append(len(engine.step()))
    assert sum(told) == len(text) and max(told) == LONGEST_RUN


@pytest.mark.parametrize("has_prompt", [False, True])
def test_runs_hold_nobody_up(monkeypatch: pytest.MonkeyPatch, has_prompt: bool) -> None:
    engine = ToyEngine.make(4, 400, 8, max_stall=2.0)
    StepClock(monkeypatch).times(engine.backend, 1.0, 0.1)
    neighbour = SamplingParams(max_tokens=300, ignore_eos=True)
    engine.submit(Request("b", [8], neighbour))
    for _ in range(3):
        engine.step()
    # What a token of a prompt costs is learnt from one.
    engine.submit(Request("c", [5] * 80, SamplingParams(max_tokens=1)))
    while "c" in engine._scheduler:
        engine.step()
    texts = {name: [k, 1, 4, 1, 5, 9, 2, 6] * 12 for k, name in enumerate("de", 3)}
    for name, text in texts.items():
        engine.submit(Request(name, [7], constraint=Recital(text, run=90)))
    for _ in range(2):
        engine.step()
    if has_prompt:
        engine.submit(Request("f", [5] * 300, SamplingParams(max_tokens=1)))
    begun = len(engine.backend.steps)
    while len(engine._scheduler.running) > 1:
        engine.step()
    steps = engine.backend.steps[begun:]
    # Steps may be twice as long, at 0.1 for each token; of that half is planned for at first, and more later.
    most = 3 + (8 if has_prompt else 12)
    assert all(sum(len(row.tokens) for row in rows) <= most for rows in steps)
    assert max(len(row.tokens) for rows in steps for row in rows if row.slot in (1, 2)) > 1
    if has_prompt:
        prompt = [len(row.tokens) for rows in steps for row in rows if row.slot == 3]
        assert sum(prompt) == 300 and min(prompt) >= 2, "it goes on in each step"


def test_forced_tokens_end_where_the_request_does() -> None:
    engine = ToyEngine.make()
    params = SamplingParams(max_tokens=3)
    events = finish(engine, Request("a", [7], params, constraint=Recital([3] * 8, run=7)))["a"]
    assert tokens_of(events) == [3, 3, 3] and events[-1].finish_reason is FinishReason.LENGTH
    params = SamplingParams(stop_token_ids=frozenset({5}))
    events = finish(engine, Request("a", [7], params, constraint=Recital([3, 4, 5, 6], run=3)))["a"]
    assert tokens_of(events) == [3, 4] and events[-1].finish_reason is FinishReason.STOP


def test_no_banned_token_is_forced() -> None:
    params = SamplingParams(banned_token_ids=frozenset({5}))
    request = Request("a", [7], params, constraint=Recital([3, 4, 5, 6], run=3))
    events = finish(ToyEngine.make(), request)["a"]
    assert tokens_of(events) == [3, 4]
    assert events[-1].finish_reason is FinishReason.ERROR
    assert events[-1].is_refused and "no token may come next" in events[-1].error


def test_log_probabilities_are_those_of_the_model_for_every_token() -> None:
    params = SamplingParams(logprobs=1)
    engine = ToyEngine.make()
    events = finish(engine, Request("a", [7], params, constraint=Recital([3, 4, 5], run=2)))["a"]
    assert tokens_of(events) == [3, 4, 5] and engine.stats.steps == 3
    assert all(event.logprob is not None for event in events)


def test_a_constraint_that_fails_ends_its_request_alone() -> None:
    engine = ToyEngine.make()
    plain = tokens_of(finish(engine, Request("b", [8]))["b"])
    failing = Request("a", [7], constraint=Recital([3] * 8, fail_at=4))
    found = finish(engine, failing, Request("b", [8]))
    assert found["a"][-1].finish_reason is FinishReason.ERROR
    assert found["a"][-1].is_refused and "too large" in found["a"][-1].error
    assert tokens_of(found["b"]) == plain


def test_a_constraint_with_twins_drafts_and_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt for several, each with its own constraint, through everything an engine does with them."""
    texts = [[n, 1, 2, 1, 2, 1, 2, n, EOS + 1] for n in range(3, 7)]
    engine = ToyEngine.make(
        max_num_seqs=2, max_model_len=24, draft_tokens=4, kv_cache_bytes=8 * 24, long_context=8
    )
    StepClock(monkeypatch).times(engine.backend, 1.0)
    requests = [
        Request(str(n), [9, 9, 9, 9, 9], priority=-n, constraint=Recital(text, run=n % 3))
        for n, text in enumerate(texts)
    ]
    found = finish(engine, *requests)
    assert [tokens_of(found[str(n)]) for n in range(4)] == texts


@pytest.fixture(scope="module")
def made(data_dir: Path) -> Iterator[tuple[Tokenizer, GrammarCompiler]]:
    with compiler_of(data_dir / "stories260K" / "hf" / "tokenizer.json") as made:
        yield made


@pytest.fixture(scope="module")
def person(made: Any) -> Grammar:
    return made[1].compile(GrammarSpec.of_schema(PERSON))


def request(grammar: Grammar | None, prompt: Sequence[int], seed: int, **fields: Any) -> Request:
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=seed, **fields)
    constraint = grammar.constraint(frozenset({END})) if grammar else None
    return Request(f"{seed}", prompt, params, constraint=constraint)


def test_a_story_teller_writes_valid_json(made: Any, person: Grammar, stories: Model) -> None:
    """A model that has never seen JSON, warm, with every filter and penalty: it cannot but be valid."""
    tokenizer, _ = made
    prompt = [1, *encode(tokenizer, "Once upon a time")]
    fields: list[dict[str, Any]] = [
        {},
        {"top_k": 2},
        {"top_p": 0.3},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 3.0, "dry_multiplier": 5.0},
        {"logit_bias": {END: 100.0}},
        {"min_p": 0.5, "typical_p": 0.5},
        {"min_tokens": 150},
    ]
    with_seeds = [request(person, prompt, n, **fields[n % 8]) for n in range(24)]
    engine = OnnxEngine.open(stories.graph, EngineOptions(max_num_seqs=8))
    found = finish(engine, *with_seeds)
    stats = engine.stats
    engine.close()
    answers = [tokenizer.decode(tokens_of(found[str(n)])) for n in range(24)]
    for n, answer in enumerate(answers):
        jsonschema.validate(json.loads(answer), PERSON)
        assert found[str(n)][-1].finish_reason is FinishReason.STOP
    assert len(set(answers)) > 12
    # 24 answers in three rounds of eight, of which no step forced a token.
    longest = sorted(len(tokens_of(events)) for events in found.values())[-1]
    assert stats.steps < longest * 3


def test_fewer_steps_than_tokens(made: Any, person: Grammar, stories: Model) -> None:
    engine = OnnxEngine.open(stories.graph, EngineOptions(max_num_seqs=1))
    events = finish(engine, request(person, [1, 403], 0))["0"]
    assert engine.stats.steps < 0.8 * len(tokens_of(events))
    engine.close()


def test_a_cut_answer_ends_by_length(made: Any, person: Grammar, stories: Model) -> None:
    engine = OnnxEngine.open(stories.graph, EngineOptions(max_num_seqs=1))
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=0)
    constraint = person.constraint(frozenset({END}))
    events = finish(engine, Request("a", [1, 403], params, constraint=constraint))["a"]
    engine.close()
    assert len(tokens_of(events)) == 12 and events[-1].finish_reason is FinishReason.LENGTH


def test_drafts_change_nothing(
    made: Any, person: Grammar, stories: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, _ = made
    prompt = [1, *encode(tokenizer, '{"name":"a","age":1,"tags":["a","a","a"],"kind":"cat"}\n')]
    answers: list[list[list[int]]] = []
    for draft_tokens in (0, 4):
        options = EngineOptions(max_num_seqs=2, draft_tokens=draft_tokens)
        engine = OnnxEngine.open(stories.graph, options)
        StepClock(monkeypatch).times(engine._backend, 1.0)
        found = finish(engine, *(request(person, prompt, seed) for seed in range(4)))
        answers.append([tokens_of(found[str(seed)]) for seed in range(4)])
        assert (engine.stats.draft_tokens > 0) == (draft_tokens > 0)
        engine.close()
    assert answers[0] == answers[1]


def test_constrained_and_free_requests_share_a_batch(
    made: Any, person: Grammar, stories: Model
) -> None:
    yes = made[1].compile(GrammarSpec("choice", ("yes", "no", "perhaps")))
    grammars = {0: person, 1: None, 2: yes, 3: None}
    engine = OnnxEngine.open(stories.graph, EngineOptions(max_num_seqs=4))
    alone = {}
    for seed, grammar in grammars.items():
        alone |= finish(engine, request(grammar, [1, 403, 407], seed))
    together = finish(engine, *(request(g, [1, 403, 407], seed) for seed, g in grammars.items()))
    engine.close()
    assert {id: tokens_of(events) for id, events in together.items()} == {
        id: tokens_of(events) for id, events in alone.items()
    }
