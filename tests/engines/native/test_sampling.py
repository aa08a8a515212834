"""What the library draws is what numpy draws, but for last bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.native.sampling import native_passes
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.engines.sampling import NUMPY, draw_token, scan, token_weights
from tests.engines.conftest import Model

FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-3, 0.3, 0.8, 1.0, 1.7, 50.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, 40, 64, 300, 5000, 2**64 + 1]),
        "top_p": st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "typical_p": st.sampled_from([1.0, 1.0, 1.0, 0.7]),
    }
)


def make_logits(seed: int, size: int, kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(size).astype(np.float32) * np.float32(rng.choice([0.1, 2, 9]))
    if kind == "masked":
        logits[rng.random(size) < 0.8] = -np.inf
        logits[rng.integers(size)] = 1.5
    elif kind == "equals":
        logits = np.round(logits) + np.float32(rng.choice([0.0, -0.0]))
    elif kind == "one":
        logits[:] = -np.inf
        logits[rng.integers(size)] = -3.0
    elif kind == "negative":
        logits -= np.float32(1e4)
    return logits


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 257, 1000, 4099]),
    kind=st.sampled_from(["plain", "masked", "equals", "one", "negative"]),
    filters=FILTERS,
)
def test_a_token_is_the_one_that_numpy_draws(
    kernels: Path, seed: int, size: int, kind: str, filters: dict[str, float]
) -> None:
    logits = make_logits(seed, size, kind)
    params = SamplingParams(**filters)  # type: ignore[arg-type]
    draw, rng = native_passes(kernels).draw, np.random.default_rng(seed)
    weights = token_weights(logits, params).astype(np.float64)
    ends = np.cumsum(weights) / weights.sum()
    # A nucleus whose share is the bound to the last bits may end on either side of a token.
    near = [
        token_weights(logits, replace(params, top_p=min(max(params.top_p + more, 0.0), 1.0)))
        for more in (-1e-6, 1e-6)
    ]
    allowed = near[0].astype(bool) | near[1].astype(bool)
    is_clear = bool((near[0].astype(bool) == near[1].astype(bool)).all())
    for uniform in [0.0, 1 - 2**-53, *rng.random(8).tolist()]:
        token = draw(logits, params, uniform, None)
        assert 0 <= token < size
        assert allowed[token]
        if is_clear:
            before = ends[token - 1] if token else 0.0
            assert before - 1e-5 <= uniform <= ends[token] + 1e-5


@pytest.mark.parametrize("size", [49_152, 50_257])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 40, "top_p": 0.95},
        {"top_k": 2000},
        {"top_p": 0.95},
        {"top_p": 0.3},
        {"min_p": 0.02},
    ],
)
def test_a_large_vocabulary(kernels: Path, size: int, filters: dict[str, float]) -> None:
    logits = make_logits(size, size, "plain")
    params = SamplingParams(temperature=0.8, **filters)  # type: ignore[arg-type]
    draw, uniforms = native_passes(kernels).draw, np.random.default_rng(1).random(200).tolist()
    found = [draw(logits, params, uniform, None) for uniform in uniforms]
    # As the second of the rows of a step.
    rows = native_passes(kernels).scan(np.stack([logits[::-1], logits]))
    assert rows.place(1) is not None
    assert found == [draw(rows.logits[1], params, uniform, rows.place(1)) for uniform in uniforms]
    wanted = [draw_token(logits, params, uniform) for uniform in uniforms]
    # One in some millions may differ: none of these does.
    assert found == wanted


def test_who_stays_of_equals(kernels: Path) -> None:
    """The lower ones, also where the last of a nucleus has equals."""
    logits = np.zeros(1000, np.float32)
    logits[[3, 500]] = 2.0
    draw = native_passes(kernels).draw
    last = 1 - 2**-53
    for count in (1, 2, 3, 40, 64, 700):
        params = SamplingParams(temperature=1.0, top_k=count)
        assert draw(logits, params, last, None) == draw_token(logits, params, last)
    for share in (0.001, 0.01, 0.1, 0.5, 0.9):
        params = SamplingParams(temperature=1.0, top_p=share)
        assert draw(logits, params, last, None) == draw_token(logits, params, last)


def test_logits_stay_as_they_are(kernels: Path) -> None:
    logits = make_logits(5, 777, "masked")
    before = logits.copy()
    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1)
    native_passes(kernels).draw(logits, params, 0.4, None)
    assert np.array_equal(logits, before)


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 257, 1000]),
    kind=st.sampled_from(["plain", "masked", "equals", "one"]),
    odd=st.sampled_from([None, np.nan, np.inf, -np.inf]),
)
def test_a_scan_finds_what_numpy_finds(
    kernels: Path, seed: int, size: int, kind: str, odd: float | None
) -> None:
    rng = np.random.default_rng(seed)
    logits = np.stack([make_logits(seed + row, size, kind) for row in range(3)])
    if odd is not None:
        logits[1, rng.integers(size, size=2)] = odd
        logits[2] = -np.inf
    found, wanted = native_passes(kernels).scan(logits), scan(logits)
    assert found.best == wanted.best
    assert np.array_equal(found.tops, wanted.tops, equal_nan=True)
    assert found.columns is not None
    for row, columns in zip(logits, found.columns, strict=True):
        if not np.isnan(row).any():
            largest = [row[i : i + 64].max() for i in range(0, size, 64)]
            assert np.array_equal(columns, largest)


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
        {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "typical_p": 0.8},
    ],
)
def test_an_engine_draws_what_numpy_draws(
    stories: Model, monkeypatch: pytest.MonkeyPatch, filters: dict[str, Any]
) -> None:
    engine = OnnxEngine.open(stories.graph, EngineOptions(3, kernels="native"))
    assert engine._passes is not NUMPY
    prompts = [[1, 403], [1, 407, 261], [1, 378], [1]]
    params = [SamplingParams(max_tokens=60, seed=n, **filters) for n in range(len(prompts))]
    found = engine.generate(prompts, params)
    monkeypatch.setattr(engine, "_passes", NUMPY)
    assert found == engine.generate(prompts, params)
    assert len({tuple(each.token_ids) for each in found}) == len(prompts)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64, 65, 200, 4099])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_masks_leave_what_is_allowed_and_find_the_largest(
    kernels: Path, size: int, share: float
) -> None:
    mask_row, rng = native_passes(kernels).mask, np.random.default_rng(size)
    for kind in ("plain", "equals", "negative"):
        for seed in range(5):
            logits, mask = make_logits(seed, size, kind), rng.random(size) < share
            found, best = mask_row(logits, mask)
            assert np.array_equal(found, np.where(mask, logits, -np.inf))
            assert best == found.argmax()
