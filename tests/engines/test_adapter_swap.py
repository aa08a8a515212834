"""Adapters that are loaded, replaced, unloaded and evicted while requests run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from lifecycle.engines import pytorch_adapters
from lifecycle.engines.backend import Row
from lifecycle.engines.base import AdapterWeights, EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.requests import FinishReason, Request, SamplingParams
from lifecycle.errors import EngineError, RequestError
from tests.engines.adapted import FORMS, GRAPH, make_adapted, open_form
from tests.engines.toy import EOS, VOCAB, ToyBackend, ToyEngine, next_token

SLOTS = 2
CHUNK = 4
PROMPT = [1, 5, 9, 7]


class AdapterToy(ToyBackend):
    """A toy whose next token depends on the adapter too. Each token in its cache carries the weights that
    it was computed with, and a text of two kinds is an error."""

    adapter_slots = SLOTS

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[int, int] = {0: 0}
        self.num_loaded = 0

    def load_adapter(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        if "seed" not in weights:
            raise EngineError("of another model")
        if instead_of:
            self.unload_adapter(instead_of)
        assert len(self.loaded) <= SLOTS, "no slot is free"
        self.num_loaded += 1
        self.loaded[self.num_loaded] = int(weights["seed"])
        return self.num_loaded

    def unload_adapter(self, number: int) -> None:
        del self.loaded[number]

    def _row(self, row: Row) -> NDArray[np.float32]:
        seed = self.loaded[row.adapter]
        marked = row._replace(tokens=[token + seed * VOCAB for token in row.tokens])
        text = self.extend(marked)
        assert {token // VOCAB for token in text} == {seed}, "computed with another adapter"
        logits = np.zeros((row.num_logits, VOCAB), np.float32)
        plain = [token % VOCAB for token in text]
        for back in range(row.num_logits):
            logits[-1 - back, _next(plain[: len(plain) - back], seed)] = 1.0
        return logits


def _next(text: Sequence[int], seed: int) -> int:
    return next_token([*text, seed])


def _continuation(prompt: Sequence[int], seed: int, limit: int) -> list[int]:
    text = list(prompt)
    while len(text) - len(prompt) < limit and (token := _next(text, seed)) != EOS:
        text.append(token)
    return text[len(prompt) :]


def _toy() -> ToyEngine:
    options = EngineOptions(3, prefill_chunk=CHUNK, prefix_cache_bytes=10 * CHUNK * 8)
    backend = AdapterToy()
    engine = ToyEngine(
        backend,
        options=options,
        vocab_size=VOCAB,
        max_model_len=24,
        eos_token_ids=frozenset({EOS}),
    )
    engine.backend = backend
    return engine


def _weights(seed: int) -> AdapterWeights:
    return {"seed": np.array(seed, np.float32)}


class AdapterMachine(RuleBasedStateMachine):
    """Whatever is done with names, each request gives what its adapter gives alone, and slots are taken by
    names and requests only."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = _toy()
        self.names: dict[str, int] = {}
        """Seed of what each name stands for, those used last at the end."""
        self.requests: dict[str, tuple[int, list[int]]] = {}
        """Seed, and what is still to come."""
        self.count = 0

    def _used(self) -> set[int]:
        return {seed for seed, _ in self.requests.values()}

    @rule(
        name=st.sampled_from("abc"),
        replace=st.booleans(),
        evict=st.booleans(),
        is_wrong=st.integers(0, 3).map(lambda n: n == 0),
    )
    def load(self, name: str, replace: bool, evict: bool, is_wrong: bool) -> None:
        self.count += 1
        # Seeds are never used twice, as weights hardly are.
        seed = self.count
        taken = {*self.names.values(), *(self._used() - {0})}
        idle = [other for other, held in self.names.items() if held not in self._used()]
        victim = None
        if name in self.names and not replace:
            fits = False
        elif name in idle:
            fits, victim = True, name
        elif len(taken) < SLOTS:
            fits = True
        else:
            victim = next(iter(idle), None) if evict else None
            fits = victim is not None
        before = self.engine.adapters
        fits = fits and not is_wrong
        weights = {} if is_wrong else _weights(seed)
        try:
            self.engine.load_adapter(
                name, weights, replace=replace, evict=["a", "b", "c"] if evict else ()
            )
        except EngineError:
            assert not fits and self.engine.adapters == before
            return
        assert fits
        if victim is not None:
            del self.names[victim]
        self.names.pop(name, None)
        self.names[name] = seed

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        self.engine.unload_adapter(name)
        del self.names[name]
        with pytest.raises(RequestError, match=f"no adapter '{name}'"):
            self.engine.submit(Request("refused", [1], adapter=name))

    @rule(data=st.data(), prompt=st.lists(st.integers(1, 2), min_size=1, max_size=9))
    def submit(self, data: st.DataObject, prompt: list[int]) -> None:
        name = data.draw(st.sampled_from([None, *sorted(self.names)]))
        seed = 0 if name is None else self.names[name]
        if name is not None:
            self.names[name] = self.names.pop(name)
        self.count += 1
        id = str(self.count)
        self.requests[id] = seed, _continuation(prompt, seed, 5)
        self.engine.submit(Request(id, prompt, SamplingParams(max_tokens=5), name))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.cancel(id)
        del self.requests[id]

    @rule()
    def step(self) -> None:
        for event in self.engine.step():
            if event.finish_reason is FinishReason.CANCELLED:
                continue
            left = self.requests[event.request_id][1]
            if event.token_id is not None:
                assert event.token_id == left.pop(0)
            if event.finish_reason is not None:
                assert not left
                del self.requests[event.request_id]

    @invariant()
    def names_are_known(self) -> None:
        assert sorted(self.engine.adapters) == sorted(self.names)


AdapterMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAdapters = AdapterMachine.TestCase


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and three adapters for its two slots."""
    root = tmp_path_factory.mktemp("swap")
    make_adapted(root, SLOTS, adapters=3)
    return root


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, root: Path) -> Iterator[Path]:
    """Both engines have two slots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_adapters, "SLOTS", SLOTS)
        yield root / request.param


def _open(model: Path) -> BatchedEngine:
    options = EngineOptions(max_num_seqs=4, prefill_chunk=4, prefix_cache_bytes=1 << 20)
    return open_form(model, options)


Output = list[tuple[int, float]]


def _finish(engine: BatchedEngine, found: dict[str, Output], steps: int = 1000) -> None:
    while steps and (engine.num_running or engine.num_waiting):
        steps -= 1
        for event in engine.step():
            assert event.token_id is not None and event.logprob is not None
            found.setdefault(event.request_id, []).append((event.token_id, event.logprob))


def _request(id: str, adapter: str | None) -> Request:
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
    return Request(id, PROMPT * 3, params, adapter)


@pytest.fixture(scope="module")
def alone(model: Path, root: Path) -> list[Output]:
    """What a request gets from each adapter, and without one."""
    outputs: list[Output] = []
    for n in (0, 1, 2, None):
        engine, found = _open(model), dict[str, Output]()
        if n is not None:
            engine.load_adapter("a", root / str(n))
        engine.submit(_request("x", "a" if n is not None else None))
        _finish(engine, found)
        outputs.append(found["x"])
    assert len({tuple(output) for output in outputs}) == 4
    return outputs


def test_a_replaced_adapter_ends_what_it_began(
    model: Path, root: Path, alone: list[Output]
) -> None:
    """To the last bit of every log-probability, beside its successor and a request without any, with all of
    them behind one prompt that the prefix cache holds."""
    engine, found = _open(model), dict[str, Output]()
    engine.load_adapter("a", root / "0")
    engine.submit(_request("old", "a"))
    _finish(engine, found, steps=6)
    assert 0 < len(found["old"]) < 12
    engine.load_adapter("a", root / "1", replace=True)
    engine.submit(_request("new", "a"))
    engine.submit(_request("plain", None))
    with pytest.raises(EngineError, match=r"all 2 adapter slots are taken \(1 until requests have"):
        engine.load_adapter("b", root / "2")
    _finish(engine, found)
    assert found == {"old": alone[0], "new": alone[1], "plain": alone[3]}
    engine.load_adapter("b", root / "2")
    found.clear()
    for id, name in (("again", "a"), ("other", "b")):
        engine.submit(_request(id, name))
    _finish(engine, found)
    assert found == {"again": alone[1], "other": alone[2]}


def test_an_unloaded_adapter_is_gone_for_new_requests_only(
    model: Path, root: Path, alone: list[Output]
) -> None:
    engine, found = _open(model), dict[str, Output]()
    engine.load_adapter("a", root / "0")
    engine.submit(_request("x", "a"))
    _finish(engine, found, steps=5)
    engine.unload_adapter("a")
    assert engine.adapters == ()
    with pytest.raises(RequestError, match="no adapter 'a' is loaded"):
        engine.submit(_request("y", "a"))
    with pytest.raises(EngineError, match="no adapter 'a' is loaded"):
        engine.unload_adapter("a")
    # The name is free at once, its slot is not.
    engine.load_adapter("a", root / "1")
    engine.submit(_request("z", "a"))
    _finish(engine, found)
    assert found == {"x": alone[0], "z": alone[1]}


def test_the_least_recently_used_one_that_may_go_does(
    model: Path, root: Path, alone: list[Output]
) -> None:
    engine, found = _open(model), dict[str, Output]()
    engine.load_adapter("a", root / "0")
    engine.load_adapter("b", root / "1")
    engine.submit(_request("x", "a"))
    with pytest.raises(EngineError, match="all 2 adapter slots are taken"):
        engine.load_adapter("c", root / "2", evict=["a"])
    engine.load_adapter("c", root / "2", evict=["a", "b"])
    assert engine.adapters == ("a", "c")
    engine.submit(_request("y", "c"))
    _finish(engine, found)
    assert found == {"x": alone[0], "y": alone[2]}
    engine.load_adapter("b", root / "1", evict=["a", "c"])
    assert engine.adapters == ("c", "b")


def test_what_does_not_fit_leaves_the_old_one(model: Path, root: Path, tmp_path: Path) -> None:
    engine = _open(model)
    engine.load_adapter("a", root / "0")
    wanted = engine.logits(PROMPT, "a")
    with pytest.raises(EngineError, match="no PEFT adapter"):
        engine.load_adapter("a", tmp_path, replace=True)
    np.testing.assert_array_equal(engine.logits(PROMPT, "a"), wanted)
    weights = dict(engine.read_adapter(root / "1"))
    engine.load_adapter("b", weights)
    name = min(weights)
    for wrong in (
        {},
        weights | {name: weights[name][:1]},
        weights | {"more": weights[name]},
        {other: weights[other] for other in weights if other != name},
    ):
        for evict in ((), ("a", "b")):
            with pytest.raises(EngineError, match=r"read for another model|slots are taken"):
                engine.load_adapter("c", wrong, evict=evict)
        with pytest.raises(EngineError, match=r"read for another model"):
            engine.load_adapter("a", wrong, replace=True)
    assert engine.adapters == ("a", "b")
    np.testing.assert_array_equal(engine.logits(PROMPT, "a"), wanted)


def test_weights_of_another_engine_are_refused(root: Path) -> None:
    """Until this one has read an adapter, it does not know how its own lie."""
    weights = _open(root / GRAPH).read_adapter(root / "0")
    for form in FORMS:
        with pytest.raises(EngineError, match="read it with this engine"):
            _open(root / form).load_adapter("a", weights)


def test_reading_in_another_thread_holds_nobody_up(
    model: Path, root: Path, alone: list[Output]
) -> None:
    """Not even for the first adapter, which opens the graph with slots."""
    engine, found = _open(model), dict[str, Output]()
    read: list[AdapterWeights] = []
    threads = [
        threading.Thread(target=lambda n=n: read.append(engine.read_adapter(root / str(n))))
        for n in range(2)
    ]
    engine.submit(_request("plain", None))
    for thread in threads:
        thread.start()
    _finish(engine, found)
    for thread in threads:
        thread.join()
    for n, weights in enumerate(read):
        engine.load_adapter(str(n), weights)
        engine.submit(_request(str(n), str(n)))
    _finish(engine, found)
    assert found["plain"] == alone[3]
    assert sorted(map(str, (found["0"], found["1"]))) == sorted(map(str, alone[:2]))
