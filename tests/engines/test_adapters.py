"""Adapters in both engines: loading, mixing, unloading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import EngineError, RequestError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu
from tests.engines.adapted import CHECKPOINT, FORMS, GRAPH, open_form

PROMPT = [1, 5, 9, 7]


@pytest.fixture(scope="module")
def folders(adapted: Path) -> list[Path]:
    return [adapted / str(n) for n in range(5)]


def _open(model: Path, folders: list[Path]) -> BatchedEngine:
    # PyTorch's last bits are those of a prompt alone if all fit in a step.
    chunk = 64 if model.name == CHECKPOINT else 8
    engine = open_form(model, EngineOptions(max_num_seqs=5, prefill_chunk=chunk))
    for n, folder in enumerate(folders):
        engine.load_adapter(f"a{n}", folder)
    return engine


def test_what_a_request_gets_does_not_depend_on_its_neighbours(
    model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """Token by token and to the last bit of every log-probability; in int8 too."""
    forms = [model]
    if model.name == GRAPH:
        forms.append(tmp_path)
        quantize_graph(model, tmp_path, "int8-rowwise", Int8Rowwise(7))
        (tmp_path / "adapters.json").write_bytes((model / "adapters.json").read_bytes())
    names = [None, "a0", "a1", "a2", "a3"]
    prompts = [PROMPT * (n + 1) for n in range(5)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
    for folder in forms:
        engine = _open(folder, folders[:4])
        alone = {
            (n, name): _run(engine, [Request("x", prompts[n], params, name)])["x"]
            for n in range(5)
            for name in names
        }
        for shift in range(5):
            mix = [names[(n + shift) % 5] for n in range(5)]
            requests = [Request(str(n), prompts[n], params, mix[n]) for n in range(5)]
            together = _run(engine, requests)
            assert together == {str(n): alone[n, mix[n]] for n in range(5)}
        assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)


def test_prompts_are_continued_by_an_adapter(model: Path, folders: list[Path]) -> None:
    engine = open_form(model, EngineOptions(prefill_chunk=8))
    engine.load_adapter("a", str(folders[0]))
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)
    plain = engine.generate([PROMPT], params)[0]
    adapted = engine.generate([PROMPT], params, adapter="a")[0]
    alone = _run(engine, [Request("x", PROMPT, params, "a")])["x"]
    assert list(zip(adapted.token_ids, adapted.logprobs, strict=True)) == alone
    assert adapted.logprobs != plain.logprobs
    with pytest.raises(RequestError, match="no adapter 'b' is loaded"):
        engine.generate([PROMPT], params, adapter="b")


def _run(engine: BatchedEngine, requests: list[Request]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            assert event.token_id is not None and event.logprob is not None
            found[event.request_id].append((event.token_id, event.logprob))
    return found


def test_rows_without_an_adapter_are_bit_identical_beside_those_with_one(
    model: Path, folders: list[Path]
) -> None:
    engine = _open(model, folders[:2])
    plain = _open(model, [])
    # Three tokens are packed as three rows, in both.
    wanted = plain.forward([Row(n, 0, PROMPT, 4) for n in range(3)]).reshape(3, 4, -1).copy()
    mixed = engine.forward([Row(n, 0, PROMPT, 4, adapter=n) for n in range(3)]).reshape(3, 4, -1)
    assert np.array_equal(mixed[0], wanted[0])
    assert not np.allclose(mixed[1], wanted[1])
    assert not np.allclose(mixed[2], mixed[1])


def test_adapters_that_move_in_the_bank_stay_themselves(adapted: Path, folders: list[Path]) -> None:
    engine = _open(adapted / GRAPH, folders[:4])
    wanted = {name: engine.logits(PROMPT, name) for name in engine.adapters}
    # Every pair, often enough that entries are exchanged.
    for _ in range(3):
        for first in range(1, 5):
            for second in range(1, 5):
                for _ in range(4):
                    rows = [Row(0, 0, PROMPT, 4, adapter=first), Row(1, 0, PROMPT, 4)]
                    rows.append(Row(2, 0, PROMPT, 4, adapter=second))
                    logits = engine.forward(rows).reshape(3, 4, -1)
                    np.testing.assert_array_equal(logits[0], wanted[f"a{first - 1}"])
                    np.testing.assert_array_equal(logits[2], wanted[f"a{second - 1}"])


def test_an_unloaded_slot_takes_another_adapter(model: Path, folders: list[Path]) -> None:
    engine = _open(model, folders[:4])
    before = {name: engine.logits(PROMPT, name) for name in engine.adapters}
    with pytest.raises(EngineError, match=r"all 4 adapter slots are taken"):
        engine.load_adapter("e", folders[4])
    engine.unload_adapter("a1")
    engine.load_adapter("e", folders[4])
    assert engine.adapters == ("a0", "a2", "a3", "e")
    for name in ("a0", "a2", "a3"):
        np.testing.assert_array_equal(engine.logits(PROMPT, name), before[name])
    other = _open(model, [folders[4]])
    np.testing.assert_array_equal(engine.logits(PROMPT, "e"), other.logits(PROMPT, "a0"))
    with pytest.raises(EngineError, match=r"no adapter 'a1' is loaded.*a0, a2, a3, e"):
        engine.logits(PROMPT, "a1")


def test_unknown_and_repeated_names_are_refused(model: Path, folders: list[Path]) -> None:
    engine = _open(model, folders[:1])
    with pytest.raises(RequestError, match=r"no adapter 'b' is loaded \(loaded: a0\)"):
        engine.submit(Request("x", PROMPT, adapter="b"))
    with pytest.raises(EngineError, match="'a0' already"):
        engine.load_adapter("a0", folders[1])


def test_graphs_without_slots_say_how_to_get_them(
    adapted: Path, folders: list[Path], tmp_path: Path
) -> None:
    export_decoder(adapted / CHECKPOINT, tmp_path, Cpu())
    with pytest.raises(EngineError, match=r"no adapter slots.*\{slots: 8, rank: 16\}"):
        OnnxEngine.open(tmp_path).load_adapter("a", folders[0])


def test_both_engines_give_the_same_answers(adapted: Path, folders: list[Path]) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    graph, checkpoint = (_open(adapted / form, folders[:4]) for form in FORMS)
    for name in (None, *graph.adapters):
        wanted, found = checkpoint.logits(PROMPT * 5, name), graph.logits(PROMPT * 5, name)
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        prompts = [PROMPT, PROMPT * 3, PROMPT[:2]]
        answers = [e.generate(prompts, params, adapter=name) for e in (graph, checkpoint)]
        assert answers[0] == answers[1]
