"""A graph for prompts beside the one that generates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.beams import BeamParams
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pace import Pace
from lifecycle.engines.prompt_graph import run_parts
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import StageError
from lifecycle.kinds import Conversations, OnnxModel
from lifecycle.pipeline.artifact import Artifact
from lifecycle.pipeline.files import make_read_only
from lifecycle.stages.prefill import Prefill
from lifecycle.stages.quantize import Quantize
from tests import tiny
from tests.conftest import RunStage, as_artifact


@pytest.fixture
def data(tmp_path: Path) -> Artifact:
    """The conversations that `tests.tiny` trains on."""
    folder = tiny.write_rows(tmp_path / "data", tiny.ROWS)
    (folder / "train.jsonl").write_text((folder / "test.jsonl").read_text())
    return as_artifact(Conversations, folder)


@pytest.fixture
def forms(learnt_onnx: OnnxModel, run_stage: RunStage) -> dict[str, Artifact]:
    """A model that has learnt a little, in int4 and in row-wise int8, as the store has them: their files
    are linked, not copied."""
    made = {
        scheme: run_stage(Quantize(model="onnx", scheme=scheme), onnx=learnt_onnx)
        for scheme in ("int4", "int8-rowwise")
    }
    for form in made.values():
        make_read_only(form.path)
    return made


def joined(run_stage: RunStage, forms: dict[str, Artifact], data: Artifact, **settings: float):
    stage = Prefill.model_validate(
        {"model": "a", "prompts": "b", "data": "d", "samples": 4, "sample_length": 64}
        | {"max_kl": 10.0}
        | settings
    )
    return run_stage(stage, a=forms["int4"], b=forms["int8-rowwise"], d=data)


def test_forms_of_other_bits_go_together(
    learnt_onnx: OnnxModel, forms: dict[str, Artifact], data: Artifact, run_stage: RunStage
) -> None:
    blocks = run_stage(Quantize(model="onnx", scheme="int8"), onnx=learnt_onnx)
    assert DecoderInfo.load(blocks.path).weight_bits is None
    made = joined(run_stage, forms | {"int4": blocks}, data)
    assert DecoderInfo.load(made.path).weight_bits in (7, 8)


def test_each_graph_computes_its_part(
    forms: dict[str, Artifact], data: Artifact, run_stage: RunStage
) -> None:
    made = joined(run_stage, forms, data)
    assert DecoderInfo.load(made.path).prefill_scheme == "int8-rowwise"
    assert made.metrics["bytes"] == sum(form.metrics["bytes"] for form in forms.values())
    assert 0 < made.metrics["kl"] < 10
    options = EngineOptions(3)
    with (
        closing(OnnxEngine.open(made.path, options)) as both,
        closing(OnnxEngine.open(forms["int4"].path, options)) as int4,
        closing(OnnxEngine.open(forms["int8-rowwise"].path, options)) as int8,
    ):
        text = [1, 5, 9, 7, 3, 8]
        prompt, plain = Row(0, 0, text, 6, num_prompt=6), Row(0, 0, text, 6)
        by_int8, by_int4 = int8.forward([plain]).copy(), int4.forward([plain]).copy()
        assert np.array_equal(both.forward([prompt]), by_int8)
        assert np.array_equal(both.forward([plain]), by_int4)
        assert not np.array_equal(by_int8, by_int4)
        # Alone: the first four tokens are a prompt, the others are not.
        start = both.forward([Row(0, 0, text[:4], 2, num_prompt=4)]).copy()
        end = both.forward([Row(0, 4, text[4:], 2)]).copy()
        # Among others: one that goes on, and a row of both kinds.
        both.forward([Row(1, 0, text[:3], 0, num_prompt=3)])
        found = both.forward(
            [Row(2, 0, text, 4, num_prompt=4), Row(1, 3, [7], 1), Row(0, 0, text, 6, num_prompt=6)]
        )
        assert np.array_equal(found[:2], start) and np.array_equal(found[2:4], end)
        assert np.array_equal(found[5:], by_int8)


def test_requests_get_what_they_get_alone(
    forms: dict[str, Artifact], data: Artifact, run_stage: RunStage
) -> None:
    """Through pre-emption, found and shared prompts, and guesses."""
    folder = joined(run_stage, forms, data).path
    shared = [1, *range(4, 24)]
    prompts = [[*shared, 5], [*shared, 5], [*shared, 9, 7], [1, 30, 31], [1, *([6, 8] * 9)]]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with closing(OnnxEngine.open(folder, EngineOptions(1, 64, prefill_chunk=8))) as engine:
        alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
        by_beams = engine.beam_search([prompts[2]], params, BeamParams(num_beams=1))
        assert by_beams[0][0].token_ids == alone[2]
    bound = 64 + 40
    options = EngineOptions(3, 64, prefill_chunk=8, prefix_cache_bytes=1 << 20, draft_tokens=3)
    with closing(OnnxEngine.open(folder, options)) as engine:
        per_token = engine.stats.cache_capacity_bytes // (3 * 64)
    tight = EngineOptions(
        *(3, 64), prefill_chunk=8, prefix_cache_bytes=1 << 20, draft_tokens=3,
        kv_cache_bytes=per_token * bound,
    )  # fmt: skip
    with closing(OnnxEngine.open(folder, tight)) as engine:
        for n, prompt in enumerate([*prompts, *prompts]):
            engine.submit(Request(str(n), prompt, params))
        found: dict[str, list[int]] = {str(n): [] for n in range(2 * len(prompts))}
        while engine.num_running or engine.num_waiting:
            for event in engine.step():
                assert not event.error
                if event.token_id is not None:
                    found[event.request_id].append(event.token_id)
        stats = engine.stats
    assert [tuple(tokens) for tokens in found.values()] == [*alone, *alone]
    assert stats.preemptions and stats.prefix_hit_tokens and stats.accepted_tokens


ROW = st.builds(
    lambda tokens, start, num_logits, num_prompt, adapter: Row(
        *(0, start, tokens, min(num_logits, len(tokens))),
        adapter=adapter,
        num_prompt=min(num_prompt, len(tokens)),
    ),
    *(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.integers(0, 50)),
    *(st.integers(0, 6), st.integers(0, 6), st.integers(0, 1)),
)


@given(st.lists(ROW, min_size=1, max_size=6))
def test_parts_come_back_in_the_order_of_the_rows(rows: list[Row]) -> None:
    rows = [row._replace(slot=slot) for slot, row in enumerate(rows)]

    def graph(kind: int):
        def run(rows: Sequence[Row]) -> NDArray[np.float32]:
            assert rows and all(row.tokens for row in rows)
            logits = [
                (kind, row.slot, row.start + place, row.tokens[place])
                for row in rows
                for place in range(len(row.tokens) - row.num_logits, len(row.tokens))
            ]
            return np.array(logits, np.float32).reshape(-1, 4)

        return run

    expected = [
        (0 if place < row.num_prompt and not row.adapter else 1, row.slot, row.start + place, token)
        for row in rows
        for place, token in enumerate(row.tokens)
        if place >= len(row.tokens) - row.num_logits
    ]
    found = run_parts(rows, graph(0), graph(1))
    assert [tuple(int(v) for v in row) for row in found] == expected


def test_models_that_do_not_fit_are_refused(
    forms: dict[str, Artifact],
    data: Artifact,
    learnt_onnx: OnnxModel,
    run_stage: RunStage,
) -> None:
    made = joined(run_stage, forms, data)
    with pytest.raises(StageError, match="has a graph for prompts already"):
        joined(run_stage, {**forms, "int4": made}, data)
    with pytest.raises(StageError, match="quantised already"):
        run_stage(Quantize(model="onnx", scheme="int4"), onnx=made)
    with pytest.raises(StageError, match=r"diverge by .* nats, max_kl allows 1e-09"):
        joined(run_stage, forms, data, max_kl=1e-9)

    def cached(scheme: str, samples: int, method: str = "rtn") -> Artifact:
        settings = {"scheme": scheme, "kv_cache": "int8", "calibration": "d", "samples": samples}
        stage = Quantize.model_validate({"model": "onnx", **settings})
        return run_stage(stage, onnx=learnt_onnx, d=data)

    int8 = cached("int8-rowwise", 4)
    with pytest.raises(StageError, match="kv_dtype is 'float32' and 'int8'"):
        joined(run_stage, {**forms, "int8-rowwise": int8}, data)
    with pytest.raises(StageError, match="have other scales, see '.*_scale'"):
        joined(run_stage, {"int4": cached("int4", 1), "int8-rowwise": int8}, data)
    fits = joined(run_stage, {"int4": cached("int4", 4), "int8-rowwise": int8}, data)
    assert 0 < fits.metrics["kl"] < 10


def test_a_step_carries_enough_of_a_prompt_to_read_its_graph_for() -> None:
    pace = Pace(3.5, has_prompt_graph=True)
    pace.note(0, 128, 0.128)
    pace.note(1, 0, 0.010)
    assert pace.prompt_room(1) == 16
    pace.note(8, 0, 0.050)
    assert pace.prompt_room(8) == 62
    for _ in range(20):
        pace.note(8, 20, 0.050 + 0.020 + 0.010)
    assert pace.prompt_room(8) == 52
