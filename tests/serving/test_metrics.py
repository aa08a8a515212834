"""`/metrics`: its format, and that its figures are those of what has happened."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2 as httpx
import pytest

from lifecycle.engines.requests import Event, FinishReason, Request
from lifecycle.errors import EngineError
from serving.metrics import Family, Histogram, Sample, write
from serving.monitor import MAX_MODELS, REASONS, Monitor
from serving.settings import ServerSettings
from tests.engines.clock import StepClock
from tests.engines.toy import ToyEngine
from tests.serving.running import MakeService, client, running, wait_until
from tests.serving.test_errors import error_of

BODY = {"model": "scripted", "prompt": "one", "max_tokens": 4}

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_SAMPLE = re.compile(rf"({_NAME})\{{((?:[a-z_]+=\"(?:[^\"\\\n]|\\[\\\"n])*\",?)*)\}} (\S+)")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"(?:,|$)')

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    """All samples of a page, each of whose lines is checked against the format's definition."""
    assert text.endswith("\n")
    found: Samples = {}
    types: dict[str, str] = {}
    family, helped = "", set[str]()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            assert family not in helped, "the lines of a metric must stand together"
            helped.add(family)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family and name not in types
            assert (kind == "counter") == name.endswith("_total")
            types[name] = kind
        else:
            matched = _SAMPLE.fullmatch(line)
            assert matched, line
            name, labels, value = matched.groups()
            suffixes = ("_bucket", "_sum", "_count") if types[family] == "histogram" else ("",)
            assert name in {family + suffix for suffix in suffixes}
            pairs = _LABEL.findall(labels)
            assert len(dict(pairs)) == len(pairs)
            assert (name, frozenset(pairs)) not in found
            found[name, frozenset(pairs)] = float(value)
    _check_histograms(found, {name for name, kind in types.items() if kind == "histogram"})
    return found


def _check_histograms(found: Samples, names: set[str]) -> None:
    for (name, labels), count in found.items():
        if name.removesuffix("_count") not in names or not name.endswith("_count"):
            continue
        base = name.removesuffix("_count")
        buckets = {
            float(dict(pairs)["le"]): value
            for (other, pairs), value in found.items()
            if other == f"{base}_bucket" and labels < pairs
        }
        values = [buckets[bound] for bound in sorted(buckets)]
        assert values == sorted(values) and values[-1] == buckets[float("inf")] == count
        assert (f"{base}_sum", labels) in found


def scrape(http: httpx.Client) -> Samples:
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(response.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    pairs = {"model_name": "scripted"} | labels
    return samples[f"lifecycle_{name}", frozenset(pairs.items())]


def ends(samples: Samples) -> dict[str, float]:
    """How many requests ended for each reason, without those that none ended for."""
    name = "request_success_total"
    counts = {reason: value(samples, name, finished_reason=reason) for reason in REASONS}
    return {reason: count for reason, count in counts.items() if count}


def test_requests_are_counted_by_how_they_ended(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(slots=2, max_queue=4)
    backend = service.backend  # type: ignore[attr-defined]
    StepClock(monkeypatch).times(backend, 1.0)
    with running(service) as url, client(url) as http:
        assert ends(scrape(http)) == {}

        def ask(**fields: object) -> httpx.Response:
            return http.post("/v1/completions", json=BODY | fields)

        whole = ask(n=2).raise_for_status().json()
        # The stop string is seen before the last token.
        backend.hold(after=19)
        ask(stop="two", max_tokens=400).raise_for_status()
        backend.go()
        ask(timeout=10, max_tokens=400).raise_for_status()
        backend.hold(after=2)
        body = BODY | {"stream": True, "max_tokens": 400}
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: not service.worker.num_unfinished)
        backend.go()
        error_of(ask(stop_token_ids=[10**6]), 400)
        backend.failure = EngineError("the runtime gave up")
        error_of(ask(), 500)
        found = scrape(http)
    assert ends(found) == {"length": 2, "stop": 1, "timeout": 1, "abort": 1, "error": 1}
    prompt = whole["usage"]["prompt_tokens"]
    # Two answers to one prompt are two requests; the failed one has not begun.
    assert value(found, "prompt_tokens_total") == 5 * prompt
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds"):
        assert value(found, f"{name}_count") == 5
    for name in ("e2e_request_latency_seconds", "request_generation_tokens"):
        assert value(found, f"{name}_count") == 4
    assert value(found, "request_prompt_tokens_sum") == 4 * prompt
    assert value(found, "generation_tokens_total") > value(found, "request_generation_tokens_sum")
    assert value(found, "request_generation_tokens_bucket", le="5.0") >= 2
    assert value(found, "time_per_output_token_seconds_count") == 4
    assert value(found, "num_requests_running") == value(found, "num_requests_waiting") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_the_last_token_completes_is_no_limit(
    make_service: MakeService, stream: bool
) -> None:
    service = make_service()
    with running(service) as url, client(url) as http:
        text = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
        assert ends(scrape(http)) == {"length": 1}
        body = BODY | {"stop": [text[-1]], "stream": stream}
        answer = http.post("/v1/completions", json=body | {"n": 2}).raise_for_status()
        assert answer.text.count('"finish_reason":"stop"') == 2
        assert ends(scrape(http)) == {"length": 1, "stop": 2}
        assert not service.worker.monitor._cut


def test_it_answers_while_the_engine_computes(make_service: MakeService) -> None:
    """A step that never ends holds up nobody who reads; and who is refused is counted."""
    service = make_service(slots=2, max_queue=2)
    backend = service.backend  # type: ignore[attr-defined]
    with running(service) as url, client(url) as http, ThreadPoolExecutor(4) as pool:
        backend.hold(after=2)
        first = pool.submit(http.post, "/v1/completions", json=BODY | {"max_tokens": 20})
        wait_until(lambda: backend.is_held)
        others = [pool.submit(http.post, "/v1/completions", json=BODY) for _ in range(3)]
        wait_until(lambda: service.worker.num_unfinished == 4)
        found = scrape(http)
        assert value(found, "num_requests_running") == 1
        assert value(found, "num_requests_waiting") == 3
        for _ in range(2):
            error_of(http.post("/v1/completions", json=BODY), 503)
        found = scrape(http)
        assert value(found, "admission_rejections_total", reason="queue_full") == 2
        backend.go()
        for each in (first, *others):
            assert each.result().status_code == 200
        found = scrape(http)
        assert value(found, "request_queue_time_seconds_count") == 4
        assert value(found, "request_queue_time_seconds_sum") > 0


def test_times_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("serving.monitor.time", clock)
    monitor = Monitor("scripted")
    monitor.begin(Request("a", [1, 2, 3]))
    for seconds in (2.0, 0.5, 1.5):
        clock.now += seconds
        monitor.take(Event("a", 5, queue_seconds=0.25))
    monitor.take(Event("a", finish_reason=FinishReason.LENGTH))
    found = parse(monitor.page(ToyEngine.make().stats))
    sums = {"time_to_first_token": 2.0, "time_per_output_token": 1.0, "e2e_request_latency": 4.0}
    for name, seconds in (sums | {"request_queue_time": 0.25}).items():
        assert value(found, f"{name}_seconds_sum") == seconds
        assert value(found, f"{name}_seconds_count") == 1


def test_it_needs_a_key_like_all_else(make_service: MakeService) -> None:
    with running(make_service(), ServerSettings(api_keys=("secret",))) as url:
        with client(url) as http:
            error_of(http.get("/metrics"), 401)
        with client(url, "secret") as http:
            scrape(http)


def test_a_real_engine_tells_of_its_cache(stories_url: str) -> None:
    with client(stories_url) as http:
        body = {"model": "stories", "prompt": "Once", "max_tokens": 2}
        http.post("/v1/completions", json=body).raise_for_status()
        found = scrape(http)
    names = {name for name, _ in found}
    assert {
        "lifecycle_kv_cache_usage_perc",
        "lifecycle_kv_cache_bytes",
        "lifecycle_prefix_cache_bytes",
        "lifecycle_prefix_cache_queries_total",
        "lifecycle_prefix_cache_hits_total",
        "lifecycle_num_preemptions_total",
        "lifecycle_spec_decode_num_draft_tokens_total",
        "lifecycle_spec_decode_num_accepted_tokens_total",
    } <= names


def test_names_of_models_are_written_as_they_are_and_only_so_many() -> None:
    monitor = Monitor('a "base" \\ of\nmine')
    for n in range(3 * MAX_MODELS):
        request = Request(str(n), [1], adapter=f"adapter-{n}")
        monitor.begin(request)
        monitor.take(Event(request.id, 5, queue_seconds=0.0))
        monitor.take(Event(request.id, finish_reason=FinishReason.STOP))
    found = parse(monitor.page(ToyEngine.make().stats))
    names = {
        dict(labels)["model_name"]
        for name, labels in found
        if name == "lifecycle_generation_tokens_total"
    }
    assert names == {f"adapter-{n}" for n in range(2 * MAX_MODELS, 3 * MAX_MODELS)}
    running = "lifecycle_num_requests_running"
    label = next(dict(pairs)["model_name"] for name, pairs in found if name == running)
    assert label == 'a \\"base\\" \\\\ of\\nmine'


@pytest.mark.parametrize(("number", "bucket"), [(0.5, 0), (1, 0), (1.5, 1), (2, 1), (9, 2)])
def test_a_value_at_a_bound_is_below_it(number: float, bucket: int) -> None:
    histogram = Histogram((1, 2))
    histogram.observe(number)
    lines = [sample.value for sample in histogram.samples({})]
    assert lines == [int(bucket <= 0), int(bucket <= 1), 1, number, 1]
    assert parse(write([Family("x", "histogram", "Help.", histogram.samples({}))]))


def test_a_page_without_samples_is_one() -> None:
    assert write([Family("x_total", "counter", "a\\b\nc", [])]) == (
        "# HELP x_total a\\\\b\\nc\n# TYPE x_total counter\n"
    )
    assert write([Family("x", "gauge", "x", [Sample(1.5)])]).endswith("x{} 1.5\n")
