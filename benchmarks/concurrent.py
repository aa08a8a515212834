"""Output of several requests at once beside other engines: mixed lengths, all within two seconds.

    python -m benchmarks.concurrent [--shape 135m] [--requests 8 16] [--turns 3] [--only int8 int4] [--json]

Prompts have 32 to 512 tokens, outputs 16 to 256, greedy, the same requests for all. All engines run the same
random weights, each with its own scheduler and converter: in 8 bits this project (row-wise int8), llama.cpp
(Q8_0), OpenVINO GenAI and CTranslate2 (8 bits per channel); in 4 bits this project (blocks of 64, head in int8),
llama.cpp (Q4_0), OpenVINO GenAI (groups of 64) and onnxruntime-genai (blocks of 32); in 16 bits `generate` of
transformers. This project keeps keys and values in int8, as OpenVINO GenAI does by default, and its steps
are not bounded (max_stall), as those of no other are. They take turns in one run; a speed is that of all output tokens from the first arrival to the
last token.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import engine_decode, llama_cpp
from benchmarks.arguments import add_threads, parser_of
from benchmarks.models import ROWWISE
from benchmarks.peers import HERE, Worker, cache_dir, environment
from benchmarks.random_llama import QWEN_HALF_BILLION, SMOLLM2_135M, kept_llama
from lifecycle.benchmarking.measure import measure
from lifecycle.benchmarking.workload import PlannedRequest
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

SHAPES = {"135m": SMOLLM2_135M, "0.5b": QWEN_HALF_BILLION}
OPENVINO = ["openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "nncf==3.4.0"]
CTRANSLATE2 = ["ctranslate2==4.8.5"]
BITS = ("int8", "int4", "16 bits")
PAUSE = 1.0
"""Seconds before each run."""
Requests = list[dict[str, Any]]
Timer = Callable[[Requests], float]


def plan(count: int, seed: int) -> Requests:
    """`count` requests with random prompts, in the order of their arrival."""
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.uniform(0, 2, count))
    return [
        {
            "prompt": rng.integers(3, 1000, rng.integers(32, 513)).tolist(),
            "output": int(rng.integers(16, 257)),
            "arrival": float(arrival - arrivals[0]),
        }
        for arrival in arrivals
    ]


def ours(engine: Engine) -> Timer:
    """Output tokens per second of this project."""

    def run(requests: Requests) -> float:
        planned = [
            PlannedRequest(np.array(r["prompt"], np.int32), r["output"], r["arrival"])
            for r in requests
        ]
        return sum(r["output"] for r in requests) / measure(engine, planned).duration

    return run


def theirs(worker: Worker, model: str) -> Timer:
    """Output tokens per second of a peer."""

    def run(requests: Requests) -> float:
        answer = worker.ask(model=model, requests=requests)
        if answer["tokens"] != (wanted := sum(r["output"] for r in requests)):
            raise RuntimeError(f"a peer gave {answer['tokens']} tokens instead of {wanted}")
        return answer["tokens"] / answer["seconds"]

    return run


def our_models(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """The checkpoint in 8 and in 4 bits, with its cache in int8."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "fp32"
    source.mkdir(parents=True)
    export_decoder(checkpoint, source, Cpu())
    info = DecoderInfo.load(source)
    texts = np.random.default_rng(1).integers(3, info.vocab_size, (4, 128)).tolist()
    made: dict[str, Path] = {}
    for bits, scheme in (("int8", ROWWISE), ("int4", Blockwise(64))):
        made[bits] = folder / bits
        made[bits].mkdir()
        cache = calibrate_cache(Calibration(source, texts), info, "int8")
        quantize_graph(source, made[bits], bits, scheme, {"lm_head": ROWWISE}, cache=cache)
    return made


def converted(python: Path, script: str, checkpoint: Path, folder: Path, last: str) -> Path:
    """What a peer's converter makes of the checkpoint, made on the first call."""
    if not (folder / last).is_dir():
        command = [str(python), "-P", str(HERE / script), "convert", str(checkpoint), str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def open_all(
    shape: str, slots: int, threads: int, without: Collection[str], stack: ExitStack
) -> dict[str, dict[str, Timer]]:
    """What is measured, by bits and by name; what is left out is not even installed."""
    folder = cache_dir() / f"llama-{shape}"
    checkpoint = kept_llama(folder, SHAPES[shape])
    engine_decode.write_tokenizer(checkpoint)
    found: dict[str, dict[str, Timer]] = {bits: {} for bits in BITS}
    options = EngineOptions(slots, 1024, threads=threads, max_stall=None)
    for bits, path in our_models(folder / "concurrent", checkpoint).items():
        engine = OnnxEngine.open(path, options)
        stack.callback(engine.close)
        found[bits]["lifecycle"] = ours(engine)

    def start(python: Path, script: str, *arguments: str) -> Worker:
        return stack.enter_context(Worker(python, script, *arguments, str(threads)))

    if "llama.cpp" not in without:
        python = environment("llama-cpp", llama_cpp.PEER, llama_cpp.BUILD)
        llama_cpp.peer_models(folder / "gguf", checkpoint, python)
        worker = start(python, "peer_llama_cpp.py", str(folder / "gguf"))
        found["int8"]["llama.cpp"], found["int4"]["llama.cpp"] = (
            theirs(worker, name) for name in llama_cpp.TYPES
        )
    if "OpenVINO GenAI" not in without:
        python = environment("openvino", OPENVINO)
        out = converted(python, "peer_openvino.py", checkpoint, folder / "openvino", "int4")
        worker = start(python, "peer_openvino.py", "serve", str(out))
        for bits in ("int8", "int4"):
            found[bits]["OpenVINO GenAI"] = theirs(worker, bits)
    if "CTranslate2" not in without:
        python = environment("ctranslate2", CTRANSLATE2)
        out = converted(python, "peer_static.py", checkpoint, folder / "ctranslate2", "int8")
        worker = start(python, "peer_static.py", "ctranslate2", str(out))
        found["int8"]["CTranslate2"] = theirs(worker, "int8")
    if "onnxruntime-genai" not in without:
        python = environment("onnxruntime-genai", engine_decode.PEER)
        out = engine_decode.peer_model(folder, checkpoint, python, threads, slots)
        worker = start(python, "peer_genai_engine.py", str(out.parent))
        found["int4"]["onnxruntime-genai"] = theirs(worker, out.name)
    if "transformers" not in without:
        worker = start(Path(sys.executable), "peer_static.py", "transformers", str(checkpoint))
        found["16 bits"]["transformers"] = theirs(worker, "bfloat16")
    return found


def take_turns(timers: dict[str, Timer], counts: list[int], turns: int) -> Iterator[dict[str, Any]]:
    """The speeds of each at each number of requests, turn by turn, to and fro."""
    for count in counts:
        speeds: dict[str, list[float]] = {name: [] for name in timers}
        for timer in timers.values():
            timer([{**request, "output": 16, "arrival": 0} for request in plan(count, turns)])
        for turn in range(turns):
            requests = plan(count, turn)
            for name in list(timers)[:: -1 if turn % 2 else 1]:
                # Threads of the one before wait for work on the same cores for a while.
                time.sleep(PAUSE)
                speeds[name].append(timers[name](requests))
        yield {"requests": count, "speeds": speeds}


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--without", nargs="*", default=[], help="engines to leave out")
    add_threads(parser)
    args = parser.parse_args()
    with ExitStack() as stack:
        timers = open_all(args.shape, max(args.requests), args.threads, args.without, stack)
        for bits in args.only:
            chosen = {n: timer for n, timer in timers[bits].items() if n not in args.without}
            for found in take_turns(chosen, args.requests, args.turns):
                row = {"shape": args.shape, "bits": bits, **found}
                print(json.dumps(row) if args.json else describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """A line for each engine, with the median of this project's speed by that engine's, turn by turn."""
    mine = row["speeds"].get("lifecycle")
    lines = [f"{row['shape']}, {row['bits']}, {row['requests']} requests, output tokens/s:"]
    for name, speeds in row["speeds"].items():
        text = f"  {name:18} {statistics.median(speeds):7.1f}"
        if mine is not None and name != "lifecycle":
            ratios = [a / b for a, b in zip(mine, speeds, strict=True)]
            text += f", we are {statistics.median(ratios):.2f} times as fast"
            text += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(text)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
