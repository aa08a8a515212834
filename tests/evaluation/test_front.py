"""The choice among measured candidates, on figures that a reader can follow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lifecycle.evaluation.front import Trial, best, holding, nearest, pareto_front

BOUND = {"kl": "<= 0.01"}


def trial(
    name: str, speed: float = 1, kl: float = 0.0, size: int = 100, error: float = 0.0, **more: float
) -> Trial:
    metrics = {"tokens_per_second": speed, "kl": kl, "bytes": size, "error": error, **more}
    return Trial(name, metrics)


def test_the_fastest_that_holds_is_the_best() -> None:
    trials = [trial("slow", 1), trial("fast", 2, 0.009), trial("bad", 3, 0.011)]
    held = holding(trials, BOUND)
    assert [t.name for t in held] == ["slow", "fast"]
    assert best(held, BOUND, "latency").name == "fast"


def test_every_bound_must_hold() -> None:
    bound = {"kl": "<= 0.01", "size": "<= 0.5", "top1_agreement": ">= 0.9"}
    good = trial("good", size=50).metrics
    trials = [
        Trial("large", {**good, "size": 0.6, "top1_agreement": 1}),
        Trial("good", {**good, "size": 0.5, "top1_agreement": 0.9}),
        Trial("other", {**good, "size": 0.5, "top1_agreement": 0.8}),
    ]
    assert [t.name for t in holding(trials, bound)] == ["good"]


def test_what_a_clock_cannot_tell_apart_is_decided_by_quality() -> None:
    close = [trial("a", 100, 0.008), trial("b", 98, 0.001), trial("c", 90, 0.0)]
    assert best(close, BOUND, "throughput").name == "b"
    noisy = [trial("a", 100, 0.008, error=0.12), trial("b", 98, 0.001), trial("c", 90, 0.0)]
    assert best(noisy, BOUND, "throughput").name == "c"
    higher = {"top1_agreement": ">= 0.9"}
    agreeing = [trial("a", 100, top1_agreement=0.95), trial("b", 99, top1_agreement=0.97)]
    assert best(agreeing, higher, "latency").name == "b"


def test_quality_decides_wherever_it_stands_in_the_bound() -> None:
    bound = {"size": "<= 0.5", "kl": "<= 0.01"}
    trials = [
        Trial(t.name, {**t.metrics, "size": size})
        for t, size in ((trial("a", 100, 0.008), 0.2), (trial("b", 99, 0.001), 0.4))
    ]
    assert best(trials, bound, "latency").name == "b"


def test_sizes_are_exact() -> None:
    trials = [trial("a", size=100, kl=0.008), trial("b", size=101), trial("c", 1, 0.007, 100)]
    assert best(trials, BOUND, "size").name == "c"


def test_the_nearest_misses_by_the_least_part() -> None:
    bound = {"kl": "<= 0.01", "perplexity_ratio": "<= 1.01"}
    trials = [
        trial("a", kl=0.02, perplexity_ratio=1.0),
        trial("b", kl=0.012, perplexity_ratio=1.05),
        trial("c", kl=float("nan"), perplexity_ratio=1.0),
    ]
    assert nearest(trials, bound).name == "b"


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.sampled_from(["latency", "size"]),
)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]], objective) -> None:
    trials = [
        trial(str(i), speed=gain, kl=loss, size=10 - gain) for i, (gain, loss) in enumerate(points)
    ]
    front = {int(t.name) for t in pareto_front(trials, BOUND, objective)}
    for i, (gain, loss) in enumerate(points):
        beaten = any((g > gain and k <= loss) or (g >= gain and k < loss) for g, k in points)
        assert (i in front) is not beaten
