"""`lifecycle bench` as a user meets it, on a real model."""

from __future__ import annotations

import json
import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lifecycle.benchmarking.report import measure_point
from lifecycle.cli import main
from lifecycle.commands import bench_engine
from lifecycle.errors import EngineError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from tests.docs.blocks import ROOT

SMALL = ["--batch", "1", "2", "--prompt", "8", "--output", "3", "--threads", "1"]
TRACE = Path("mooncake_trace", "synthetic_trace.jsonl")

NUMBER = {"type": "number", "minimum": 0}
INTEGER = {"type": "integer", "minimum": 0}


def closed(**properties: Any) -> dict[str, Any]:
    """A schema of an object with these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


TEXT = {"type": "string"}
LATENCY = or_null(closed(mean=NUMBER, median=NUMBER, p90=NUMBER, p99=NUMBER))
POINT = closed(
    concurrency=or_null(INTEGER),
    rate=or_null(NUMBER),
    prompt_len=or_null(INTEGER),
    output_len=or_null(INTEGER),
    complete={"type": "boolean"},
    **dict.fromkeys(("requests", "completed"), INTEGER),
    **dict.fromkeys(("prompt_tokens", "cached_tokens", "output_tokens"), INTEGER),
    **dict.fromkeys(("duration_s", "request_throughput"), NUMBER),
    **dict.fromkeys(("output_throughput", "total_throughput"), NUMBER),
    goodput=or_null(NUMBER),
    **dict.fromkeys(("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "queue_ms"), LATENCY),
    peak_rss_bytes=INTEGER,
    rss_growth_bytes=or_null(INTEGER),
)
TRACE_INFO = closed(path=TEXT, speed=NUMBER, scale=NUMBER, requests=INTEGER, skipped=INTEGER)
SCHEMA = closed(
    format={"const": 1},
    benchmark={"const": "engine"},
    status={"enum": ["ok", "interrupted", "failed"]},
    model=closed(
        name=TEXT, path=TEXT, **dict.fromkeys(("architecture", "scheme", "kv_dtype"), or_null(TEXT))
    ),
    engine=closed(
        name=TEXT,
        **dict.fromkeys(("max_num_seqs", "max_model_len", "threads", "prefill_chunk"), INTEGER),
        prefix_cache_bytes=INTEGER,
        kv_cache_bytes=or_null(INTEGER),
        max_stall=or_null(NUMBER),
        draft_tokens=INTEGER,
        **dict.fromkeys(("draft_model", "packed_weights", "kernels"), or_null(TEXT)),
        providers=or_null({"type": "array", "items": TEXT}),
    ),
    workload=closed(
        kind={"enum": ["closed-loop", "poisson", "trace"]},
        seed=INTEGER,
        goodput=or_null({"type": "object", "additionalProperties": NUMBER}),
        trace=or_null(TRACE_INFO),
    ),
    environment=closed(lifecycle=TEXT, python=TEXT, platform=TEXT, cores=INTEGER),
    points={"type": "array", "items": POINT},
)


@pytest.fixture(scope="session")
def decoder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """stories260K, exported: 512 positions."""
    folder = tmp_path_factory.mktemp("stories")
    export_decoder(data_dir / "stories260K" / "hf", folder, Cpu())
    return str(folder)


@pytest.fixture
def bench(decoder: str, capsys):
    """Run `lifecycle bench engine` with `--json`: its exit code and its object."""

    def run(*args: str) -> tuple[int, dict[str, Any]]:
        code = main(["bench", "engine", decoder, *args, "--json"])
        found = json.loads(capsys.readouterr().out)
        jsonschema.validate(found, SCHEMA)
        return code, found

    return run


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, but for those that never are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(page: str) -> list[str]:
    """All tags of a page that is well-formed and refers to nothing outside it."""
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert "://" not in page
    assert not re.search(r"\bnan\b", page)
    return parser.seen


def test_a_sweep_measures_every_combination(bench) -> None:
    code, found = bench(*SMALL, "--prompt", "8", "20", "--requests", "3", "--goodput", "ttft:60000")
    assert (code, found["status"]) == (0, "ok")
    assert found["engine"]["max_num_seqs"] == 2
    assert found["engine"]["max_model_len"] == 23
    points = found["points"]
    assert [(p["prompt_len"], p["concurrency"]) for p in points] == [
        (8, 1), (8, 2), (20, 1), (20, 2)
    ]  # fmt: skip
    for point in points:
        assert (point["requests"], point["completed"], point["complete"]) == (3, 3, True)
        assert point["prompt_tokens"] == 3 * point["prompt_len"]
        assert (point["output_tokens"], point["cached_tokens"]) == (9, 0)
        assert point["goodput"] == pytest.approx(point["request_throughput"])
        assert point["ttft_ms"]["median"] <= point["e2el_ms"]["median"]


def test_the_json_keys_are_documented() -> None:
    text = (ROOT / "docs" / "benchmarking.md").read_text("utf-8")
    for schema in (SCHEMA, POINT, TRACE_INFO):
        for key in schema["properties"]:
            assert f"`{key}`" in text, key


def test_a_draft_model_is_taken_and_named(bench, decoder: str) -> None:
    _, found = bench(*SMALL, "--draft-model", decoder, "--draft-tokens", "2", "--kv-cache", "0")
    assert found["engine"]["kv_cache_bytes"] is None
    assert found["engine"]["draft_model"] == decoder and found["engine"]["draft_tokens"] == 2


def test_the_providers_that_ran_are_named(bench) -> None:
    wanted = ["CPUExecutionProvider"]
    for options in ([], ["--provider", "cpu:use_arena=0"]):
        _, found = bench(*SMALL, "--requests", "2", *options)
        assert found["engine"]["providers"] == wanted


def test_random_arrivals(bench) -> None:
    code, found = bench("--rate", "500", "--prompt", "8", "--output", "1", "--requests", "5")
    assert code == 0
    assert found["workload"]["kind"] == "poisson"
    (point,) = found["points"]
    assert (point["rate"], point["completed"], point["tpot_ms"]) == (500, 5, None)


def test_a_trace_shares_prefixes_and_counts_what_does_not_fit(
    bench, data_dir: Path, tmp_path: Path
) -> None:
    rows = [
        {"timestamp": 10 * i, "input_length": n, "output_length": 4, "hash_ids": ids}
        for i, (n, ids) in enumerate(
            [(2000, [0, 1, 2, 3]), (2000, [0, 1, 2, 4]), (9999, [*range(20)])]
        )
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--scale", "8", "--prefix-cache", "16", "--prefill-chunk", "32"]
    code, found = bench("--trace", str(path), *options, "--max-num-seqs", "1")
    assert code == 0
    assert found["workload"]["trace"] == {
        "path": str(path), "speed": 1, "scale": 8, "requests": 2, "skipped": 1
    }  # fmt: skip
    # Three blocks of 512 / 8 tokens are shared, which are six chunks.
    assert found["points"][0]["cached_tokens"] == 192
    real = ["--trace", str(data_dir / TRACE), "--requests", "12", "--speed", "1000"]
    assert bench(*real, "--scale", "400")[1]["points"][0]["completed"] == 12


def test_a_table_has_no_empty_columns(decoder: str, data_dir: Path, capsys) -> None:
    trace = ["--trace", str(data_dir / TRACE), "--requests", "1", "--scale", "999"]
    assert main(["bench", "engine", decoder, *trace]) == 0
    out = capsys.readouterr().out
    # The lengths of a trace differ, and its one answer has one token.
    assert "TTFT ms" in out
    assert "prompt" not in out and "TPOT" not in out


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        ([*SMALL, "--prompt", "8", "12"], 1 + 2 * 3 + 2),
        (["--rate", "500", "--prompt", "8", "--output", "3", "--requests", "4"], 2),
    ],
)
def test_the_page(options: list[str], figures: int, decoder: str, tmp_path: Path, capsys) -> None:
    page = tmp_path / "bench.html"
    assert main(["bench", "engine", decoder, *options, "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert str(page) in out.splitlines()[-1]
    assert "output tokens/s" in out
    seen = tags(page.read_text("utf-8"))
    assert (seen.count("svg"), seen.count("table")) == (figures, 2)


def test_ctrl_c_shows_what_was_measured(bench, monkeypatch, tmp_path: Path) -> None:
    calls = 0

    def interrupted_second(*args: Any, **options: Any):
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGINT)
        return measure_point(*args, **options)

    monkeypatch.setattr(bench_engine, "measure_point", interrupted_second)
    before = signal.getsignal(signal.SIGINT)
    code, found = bench(*SMALL, "--out", str(tmp_path / "x.html"))
    assert (code, found["status"], len(found["points"])) == (130, "interrupted", 1)
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted" in (tmp_path / "x.html").read_text("utf-8")


def test_a_failing_engine_shows_what_was_measured(bench, monkeypatch) -> None:
    def fail(*args: Any, **options: Any):
        raise EngineError("gave up")

    monkeypatch.setattr(bench_engine, "measure_point", fail)
    code, found = bench(*SMALL)
    assert (code, found["status"], found["points"]) == (1, "failed", [])


@pytest.mark.parametrize("argv", [[], ["engin"]])
def test_no_or_unknown_benchmark_prints_the_usage(argv: list[str], capsys) -> None:
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert "usage: lifecycle bench" in captured.out + captured.err
    assert ("did you mean 'engine'?" in captured.err) is bool(argv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0"], "--rate: '0': give arrivals per second, a number above 0"),
        (["--rate", "nan"], "--rate: 'nan': give"),
        (["--batch"], "--batch: expected at least one argument"),
        (["--batch", "1", "0"], "--batch: '0': give an integer, 1 or more"),
        (["--goodput", "tft:9"], "unknown key 'tft'; did you mean 'ttft'?"),
        (["--goodput", "ttft"], "'ttft': give milliseconds above 0, as in ttft:200"),
        (
            ["--prompt", "9", "500"],
            "--prompt 500 and --output 64 take 564 tokens, more than the model's context of 512",
        ),
        (["--max-model-len", "50"], "more than --max-model-len 50: give less"),
        (["--max-model-len", "513"], "--max-model-len 513 is more than the model's context of 512"),
        (["--requests", "3"], "--requests 3 is less than --batch 8"),
        (["--scale", "2"], "--scale goes with --trace"),
        (["--rate", "1", "--batch", "2"], "--batch does not go with --rate"),
        (["--trace", "x", "--output", "2"], "--output does not go with --trace"),
        (["--trace", "x", "--rate", "2"], "--rate: not allowed with argument --trace"),
        (["--out", "."], "--out . is a folder"),
        (["--out", "no/such/x.html"], "there is no folder no/such; make it first"),
        (["--engine", "onnxruntim"], "unknown engine 'onnxruntim'; did you mean 'onnxruntime'?"),
        (["--drat-tokens", "2"], "--drat-tokens 2; did you mean '--draft-tokens'?"),
        (["--seed", "-1"], "--seed: '-1': give an integer, 0 or more"),
        (["--provider", "cpu:2"], "--provider: 'cpu:2': give NAME or NAME:KEY=VALUE,..., as in"),
    ],
)
def test_bad_arguments(options: list[str], message: str, decoder: str, capsys) -> None:
    assert main(["bench", "engine", decoder, *options]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_provider_is_named(decoder: str, capsys) -> None:
    assert main(["bench", "engine", decoder, "--provider", "cudda"]) == 1
    message = capsys.readouterr().err
    assert "the provider is 'cudda', which this onnxruntime does not have; it has" in message
    assert "CPUExecutionProvider" in message


def test_a_trace_that_does_not_fit_names_the_scale(decoder: str, data_dir: Path, capsys) -> None:
    trace = ["--trace", str(data_dir / TRACE), "--requests", "2"]
    assert main(["bench", "engine", decoder, *trace]) == 2
    message = capsys.readouterr().err
    assert "none of 2 requests fits into the model's context of 512" in message
    assert "--scale 79" in message


def test_what_is_no_decoder(decoder: str, data_dir: Path, tmp_path: Path, capsys) -> None:
    for model, message in (
        (tmp_path, "is no exported decoder, it has no decoder.json: name a bundle"),
        (data_dir / "stories260K" / "hf", "--engine pytorch, or export it"),
        (Path(decoder) / "model.onnx", "is a file: name the folder that it is in"),
    ):
        assert main(["bench", "engine", str(model)]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", "engine", "nothing", "--store", str(tmp_path / "store")]) == 1
    assert "'nothing' is neither a folder nor a run" in capsys.readouterr().err
