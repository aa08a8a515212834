"""Every architecture gives PyTorch's logits, however the tokens are fed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lifecycle.engines.decoder import DecoderInfo
from lifecycle.graph.check import check_graph
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.graph.models import MODELS, VOCAB, save_model, torch_logits
from tests.graph.running import GraphRunner

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_pytorch(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    out = tmp_path / "onnx"
    out.mkdir()
    export_decoder(tmp_path, out, Cpu())
    check_graph(out)
    random = np.random.default_rng(1)
    ids = [random.integers(3, VOCAB, count).tolist() for count in (40, 12, 25)]
    wanted = [torch_logits(model, row) for row in ids]

    beyond = DecoderInfo.load(out).long_context
    long = [beyond is not None and len(row) > beyond for row in ids]

    whole = GraphRunner(out, long=[0] if long[0] else []).prefill(ids[0])
    assert np.abs(whole - wanted[0]).max() < TOLERANCE

    runner = GraphRunner(out, long=[0] if long[0] else [])
    chunks = [runner.prefill(ids[0][start : start + 16]) for start in range(0, 40, 16)]
    assert np.abs(np.concatenate(chunks) - wanted[0]).max() < TOLERANCE

    assert np.abs(_rolled_back(out, ids[0], long[0]) - wanted[0]).max() < TOLERANCE

    for found, row in zip(_ragged(out, ids, long), wanted, strict=True):
        assert np.abs(found - row).max() < TOLERANCE


def _rolled_back(out: Path, ids: list[int], is_long: bool) -> np.ndarray:
    """After 20 tokens eight wrong ones, as a failed speculation, which are then forgotten."""
    runner = GraphRunner(out, long=[0] if is_long else [])
    first = runner.prefill(ids[:20])
    runner.prefill(ids[8:16])
    runner.lengths[0] = 20
    return np.concatenate([first, runner.prefill(ids[20:])])


def _ragged(out: Path, ids: list[list[int]], long: list[bool]) -> list[np.ndarray]:
    """Three rows of four slots at different speeds: prefill, decode and idle in one step."""
    slots, widths = (3, 0, 2), (9, 1, 4)
    runner = GraphRunner(out, slots=4, long=[slots[i] for i in range(3) if long[i]])
    logits: list[list[np.ndarray]] = [[] for _ in ids]
    fed = [0, 0, 0]
    turn = 0
    while any(done < len(row) for done, row in zip(fed, ids, strict=True)):
        turn += 1
        step: dict[int, list[int]] = {}
        for i, row in enumerate(ids):
            waits = (turn + i) % 3 == 0
            if not waits and fed[i] < len(row):
                step[slots[i]] = row[fed[i] : fed[i] + widths[i]]
                fed[i] += len(step[slots[i]])
        if step:
            found = runner.step(step)
            for i, slot in enumerate(slots):
                if slot in found:
                    logits[i].append(found[slot])
    return [np.concatenate(parts) for parts in logits]


def test_a_row_does_not_depend_on_the_others(tiny: Path) -> None:
    ids = list(range(3, 20))
    alone, among = GraphRunner(tiny), GraphRunner(tiny, slots=3)
    assert np.array_equal(alone.prefill(ids), among.step({0: [5, 6], 1: ids, 2: ids[::-1]})[1])
    assert np.array_equal(alone.prefill([7]), among.step({1: [7], 2: [8], 0: ids})[1])


def test_a_step_may_hold_more_tokens_than_the_context(stories: Path) -> None:
    context = DecoderInfo.load(stories).max_position_embeddings
    ids = [3 + i % 500 for i in range(context // 2 + 1)]
    alone, among = GraphRunner(stories, 1, context), GraphRunner(stories, 2, context)
    assert np.array_equal(alone.prefill(ids), among.step({0: ids, 1: ids})[1])


def test_real_weights_tell_the_published_story(stories: Path, data_dir: Path) -> None:
    path = data_dir / "stories260K" / "expected_greedy.json"
    ids = json.loads(path.read_text())["greedy_ids_numpy"]
    runner = GraphRunner(stories, capacity=len(ids))
    assert runner.greedy(ids[:1], len(ids) - 1) == ids[1:]


def test_decoder_json_says_what_an_engine_needs(tiny: Path) -> None:
    info = DecoderInfo.load(tiny)
    assert (info.architecture, info.scheme, info.target) == ("llama", "fp32", "cpu")
    assert (info.num_layers, info.num_kv_heads, info.head_size) == (2, 2, 16)
    assert (info.bos_token_id, info.eos_token_ids) == (1, (2,))
    assert info.providers == ("CPUExecutionProvider",)


def test_tied_embeddings_are_stored_once(tiny: Path) -> None:
    hidden, inner, width, layers = 64, 96, 64 + 2 * 32, 2
    block = width * hidden + hidden * hidden + 3 * hidden * inner + 2 * hidden
    floats = VOCAB * hidden + layers * block + hidden + 2 * 128 * 8
    assert (tiny / "model.onnx.data").stat().st_size == 4 * floats
