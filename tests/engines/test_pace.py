"""What steps are expected to take, from machines whose steps take what a formula says."""

from __future__ import annotations

import numpy as np
import pytest

from lifecycle.engines.pace import EVERY, Pace


def step_seconds(num_decode: int, num_prompt: int, base: float, token: float) -> float:
    decode = 0.008 + 0.001 * num_decode
    return decode + (base + token * num_prompt if num_prompt else 0.0)


def told() -> Pace:
    """One that knows a decoding step and a large one of a prompt, of tokens that take 0.5 ms each."""
    pace = Pace(3.5)
    pace.note(1, 0, 0.009)
    pace.note(0, 128, 0.009 + 127 * 0.0005)
    return pace


@pytest.mark.parametrize("base", [0.0, 0.004])
@pytest.mark.parametrize("warm", [True, False])
def test_a_prompt_gets_what_a_step_has_room_for(base: float, warm: bool) -> None:
    """Also where its first token costs more than the others, by however many tokens prompts were known before."""
    pace, token = Pace(3.5), 0.0005
    pace.note(0, 128 if warm else 10, 0.009 + token * (127 if warm else 9))
    pace.note(2, 0, step_seconds(2, 0, base, token))
    pace.note(1, 0, step_seconds(1, 0, base, token))
    for _ in range(40):
        room = pace.prompt_room(2)
        assert room is not None
        pace.note(2, max(room, 2), step_seconds(2, max(room, 2), base, token))
    taken = step_seconds(2, max(room, 2), base, token)
    assert 2.05 < taken / step_seconds(2, 0, base, token) < 2.31


def test_what_first_tokens_cost_follows_the_prompt_and_is_forgotten() -> None:
    pace = told()
    for length in range(100):
        base = 0.0001 * length
        room = max(pace.prompt_room(1) or 0, 2)
        seconds = step_seconds(1, room, base, 0.0005)
        assert seconds < 2.35 * 0.009
        pace.note(1, room, seconds)
    assert room < 10
    for _ in range(20):
        room = pace.prompt_room(1) or 2
        pace.note(1, room, step_seconds(1, room, 0.0, 0.0005))
    assert room > 19


def test_a_first_token_that_costs_too_much_leaves_no_room() -> None:
    pace = told()
    for _ in range(10):
        pace.note(1, 2, step_seconds(1, 2, 0.030, 0.0005))
    assert pace.prompt_room(1) == 0


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noise_moves_no_estimate_away_for_good(noise: float) -> None:
    rng = np.random.default_rng(0)
    pace = Pace(3.0)
    pace.note(1, 0, 0.030)
    pace.note(0, 128, 0.030 + 127 * 0.002)
    taken: list[float] = []
    for _ in range(1000):
        room = max(pace.prompt_room(1) or 0, 2)
        expected = 0.030 + 0.002 * room
        taken.append(expected / 0.030)
        pace.note(1, room, expected * rng.lognormal(0, noise))
    assert 1.7 < np.median(taken) < 2.4 and np.percentile(taken, 99) < 2.5
    # More may decode, of which nothing has been measured with a prompt yet.
    pace.note(8, 0, 0.090)
    room = pace.prompt_room(8)
    assert room is not None and 0.090 + 0.002 * room < 2.5 * 0.090


def test_steps_that_prompts_do_not_make_longer_are_noted_too() -> None:
    pace = told()
    for _ in range(10):
        pace.note(1, 2, step_seconds(1, 2, 0.008, 0.0005))
    assert (pace.prompt_room(1) or 0) < 11
    for _ in range(20):
        pace.note(1, 2, 0.008)
    assert (pace.prompt_room(1) or 0) > 19


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_steps_are_as_long_as_their_texts(noise: float) -> None:
    """What was measured with long texts says what steps take with short ones, and the other way round."""
    rng = np.random.default_rng(0)

    def seconds(num_decode: int, context: int) -> float:
        return 0.004 + 0.0002 * num_decode + 0.000002 * context

    pace = Pace()
    for num_decode, lengths in (
        (4, range(0, 1000, 4)),
        (4, range(0, 1000, 4)),
        (9, range(0, 40, 4)),
    ):
        for pace.context in lengths:
            pace.note(num_decode, 0, seconds(num_decode, pace.context) * rng.normal(1, noise))
    for context in (0, 100, 1000):
        pace.context = context
        for num_decode in (4, 6, 9):
            expected = pace.decode_seconds(num_decode)
            assert expected == pytest.approx(seconds(num_decode, context), rel=0.02 + 2 * noise)


def test_texts_of_one_length_say_nothing_of_others() -> None:
    pace = Pace()
    for taken in (0.010, 0.011, 0.009, 0.010):
        pace.context = 500
        pace.note(2, 0, taken)
    pace.context = 20
    assert pace.decode_seconds(2) == pytest.approx(0.010, rel=0.05)
    # Nor does one step that took long by accident.
    pace.context = 510
    pace.note(2, 0, 1.0)
    pace.context = 0
    expected = pace.decode_seconds(2)
    assert expected is not None
    assert expected >= 0.0025


def measured(seconds: float, count: int = 40) -> Pace:
    """A machine on which a step of 2 took so long, a few times."""
    pace = Pace()
    for _ in range(count):
        pace.note(2, 0, seconds)
    return pace


def test_one_slow_step_says_little_and_many_say_all() -> None:
    pace = measured(0.010)
    pace.note(2, 0, 0.050)
    assert pace.decode_seconds(2) == pytest.approx(0.0105)
    for _ in range(20):
        pace.note(2, 0, 0.020)
    assert pace.decode_seconds(2) == pytest.approx(0.020, rel=0.02)


def test_what_was_measured_long_ago_counts_less() -> None:
    pace = measured(0.010)
    pace.seconds += 0.1
    pace.note(2, 0, 0.008)
    assert pace.decode_seconds(2) == pytest.approx(0.0096)
    pace = measured(0.010)
    pace.seconds += 0.2
    pace.note(2, 0, 0.008)
    assert pace.decode_seconds(2) == pytest.approx(0.009)
    pace.note(2, 0, 0.008)
    assert pace.decode_seconds(2) == pytest.approx(0.0088)


def test_steps_are_in_doubt_once_texts_are_others() -> None:
    """Until some have been made with those."""
    rng = np.random.default_rng(0)
    pace = Pace()
    for pace.context in range(0, 1600, 8):
        pace.note(8, 0, (0.005 + 2e-6 * pace.context) * rng.normal(1, 0.05))
    assert not pace.is_doubted(8)
    pace.context = 0
    assert pace.is_doubted(8)
    for _ in range(4):
        pace.note(8, 0, 0.005)
    assert not pace.is_doubted(8)
    assert pace.decode_seconds(8) == pytest.approx(0.005, rel=0.05)


def test_noise_is_how_far_steps_are_off() -> None:
    rng = np.random.default_rng(0)
    pace = Pace()
    for _ in range(1000):
        pace.note(1, 0, 0.010 * rng.normal(1, 0.05))
    assert pace.noise == pytest.approx(0.045, abs=0.015)


def test_texts_that_grow_no_more_say_nothing() -> None:
    """As where windows are full: what is left of differences would be a slope without bounds."""
    rng = np.random.default_rng(0)
    pace = Pace()
    for pace.context in [*range(0, 400, 8), *[400] * 40_000]:
        pace.note(8, 0, 0.005 * rng.normal(1, 0.05))
    pace.context = 300
    assert not pace.is_doubted(8)
    assert pace.decode_seconds(8) == pytest.approx(0.005, rel=0.1)


def long_prompts(pace: Pace, slow: float, count: int, factor: float = 1.9) -> list[int]:
    """Tokens of prompts in steps of which a share of `slow` take `factor` times what is expected."""
    rng = np.random.default_rng(0)
    rooms: list[int] = []
    for _ in range(count):
        room = pace.prompt_room(1) or 0
        rooms.append(room)
        times = factor if rng.random() < slow else 1.0
        pace.note(1, max(room, 2), times * (0.009 + 0.0005 * max(room, 2)))
    return rooms


def test_prompts_get_less_where_steps_often_take_longer_and_more_where_they_do_not() -> None:
    first = told().prompt_room(1)
    assert first is not None
    often, never = long_prompts(told(), 0.05, 2000), long_prompts(told(), 0.0, 4000)
    assert np.mean(often[-500:]) < 0.8 * first < 1.2 * first < never[-1]
    # However bad or good it is, there are bounds.
    assert min(long_prompts(told(), 1.0, 500, 1.6)) > 0.2 * first
    bound = (3.5 - 1) * 0.009 / 0.0005
    assert never[-1] < 0.85 * bound


@pytest.mark.parametrize("every", [1, EVERY])
def test_what_is_measured_now_and_then_is_followed_too(every: int) -> None:
    pace = Pace(every=every)
    for _ in range(40):
        pace.note(3, 0, 0.010)
    assert pace.decode_seconds(3) == pytest.approx(0.010)
    for _ in range(120):
        pace.note(3, 0, 0.020)
    assert pace.decode_seconds(3) == pytest.approx(0.020, rel=0.05)
    # A size that comes now and then is measured each time that it comes.
    for n in range(60):
        pace.note(3, 0, 0.020)
        if n % 10 == 0:
            pace.note(1, 0, 0.005 if n < 30 else 0.010)
    assert pace.decode_seconds(1) == pytest.approx(0.010, rel=0.2)


def test_what_prompts_leave_over_says_nothing_of_plans() -> None:
    pace = told()
    before = pace.stall_seconds(1)
    for _ in range(3000):
        pace.prompt_room(1)
        pace.note(1, 4, 0.012)
    assert pace.stall_seconds(1) == before
