from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.training.schedule import learning_rate
from lifecycle.training.settings import LoopSettings

SCHEDULES = ("cosine", "linear", "constant")


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(SCHEDULES),
)
def test_rates_are_positive_and_never_above_the_setting(
    total: int, warmup: float, schedule: str
) -> None:
    settings = LoopSettings.model_validate({"warmup": warmup, "schedule": schedule})
    rates = [learning_rate(step, total, settings) for step in range(total)]
    assert all(0 < rate <= settings.learning_rate for rate in rates)
    top = max(range(total), key=rates.__getitem__)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1)])
def test_half_way(schedule: str, half: float) -> None:
    settings = LoopSettings.model_validate(
        {"schedule": schedule, "warmup": 0.0, "learning_rate": 1.0}
    )
    assert learning_rate(50, 100, settings) == pytest.approx(half)


def test_warm_up_is_linear() -> None:
    settings = LoopSettings(warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(step, 100, settings) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 10 for step in range(10)])
