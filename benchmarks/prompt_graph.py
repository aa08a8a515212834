"""What a graph of its own for prompts gives: int4 for what is generated with row-wise int8 for prompts.

    python -m benchmarks.prompt_graph [--rounds 9] [--prompt 512] [--output 64] [--json]

Random weights of the 135M shape. One request at a time, whose engines take turns: time to the first token, time
between tokens, and of the whole request, as ratios to those of the int4 graph and of the int8 graph alone;
medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.models import ROWWISE
from benchmarks.random_llama import SMOLLM2_135M, write_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import GRAPH, PREFILL_WEIGHTS, WEIGHTS, DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.prefill import write_prefill
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

SCHEMES = {"int4": Blockwise(64), "int8-rowwise": ROWWISE}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = measure(make_models(Path(root)), args.rounds, args.prompt, args.output)
    if args.json:
        print(json.dumps(found))
        return
    for name, ratios in found.items():
        text = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
        print(f"both graphs by {name} alone, in time: {text}")


def make_models(root: Path) -> dict[str, Path]:
    """The model in both forms, and joined."""
    write_llama(root / "hf", SMOLLM2_135M)
    full = root / "full"
    full.mkdir()
    export_decoder(root / "hf", full, Cpu())
    made = {name: root / name for name in (*SCHEMES, "both")}
    for name, scheme in SCHEMES.items():
        made[name].mkdir()
        quantize_graph(full, made[name], name, scheme, {"lm_head": ROWWISE})
    decode, prompts, both = made["int4"], made["int8-rowwise"], made["both"]
    both.mkdir()
    for name in (GRAPH, WEIGHTS):
        (both / name).hardlink_to(decode / name)
    (both / PREFILL_WEIGHTS).hardlink_to(prompts / WEIGHTS)
    write_prefill(prompts, both)
    replace(DecoderInfo.load(decode), prefill_scheme="int8-rowwise").save(both)
    return made


def measure(
    models: dict[str, Path], rounds: int, prompt: int, output: int
) -> dict[str, dict[str, float]]:
    """Times with both graphs by those with each alone."""
    options = EngineOptions(1, prompt + output)
    engines = {name: OnnxEngine.open(folder, options) for name, folder in models.items()}
    tokens = np.random.default_rng(0).integers(3, 1000, prompt).tolist()
    names = ("first token", "next tokens", "request")
    ratios = {name: {key: list[float]() for key in names} for name in SCHEMES}
    for turn in range(rounds + 1):
        times = {name: one_request(engine, tokens, output) for name, engine in engines.items()}
        for name, found in ratios.items() if turn else ():
            for key, ours, alone in zip(names, times["both"], times[name], strict=True):
                found[key].append(ours / alone)
    return {
        name: {key: statistics.median(values) for key, values in found.items()}
        for name, found in ratios.items()
    }


def one_request(engine: OnnxEngine, prompt: list[int], output: int) -> tuple[float, float, float]:
    """Seconds to the first token, between tokens, and altogether."""
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    begun, first = time.perf_counter(), 0.0
    engine.submit(Request("r", prompt, params))
    while engine.num_running or engine.num_waiting:
        if engine.step() and not first:
            first = time.perf_counter() - begun
    whole = time.perf_counter() - begun
    return first, (whole - first) / (output - 1), whole


if __name__ == "__main__":
    main()
