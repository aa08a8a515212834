"""Speed beside llama.cpp, on a 135M-parameter Llama: decoding at batch 1 and 8, and prefill.

    python -m benchmarks.llama_cpp --turns 9 --json

Both run the same random weights: this project as the stage `quantize` makes them by default, in
row-wise int8 and in int4; llama.cpp, built for this processor, as its own quantiser writes Q8_0
and Q4_0. All take turns in one run; a ratio is the median over the turns. Above 1, this project is
faster. llama.cpp is given its tokens, this project also chooses them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.arguments import add_threads, parser_of
from benchmarks.models import ROWWISE
from benchmarks.peers import HERE, Worker, cache_dir, environment
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu
from lifecycle.stages.quantize import Quantize

PEER = ["llama-cpp-python==0.3.36", "gguf==0.19.0"]
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
TYPES = ("Q8_0", "Q4_0")


class Work(NamedTuple):
    """What is timed: prompts of `batch` sequences, then steps in which each decodes a token."""

    batch: int
    prompt: int
    steps: int

    @property
    def timed_tokens(self) -> int:
        """Decoded tokens, or those of the prompts where none are decoded."""
        return self.batch * (self.steps or self.prompt)


WORK = {
    "decode, batch 1": Work(1, 16, 112),
    "decode, batch 8": Work(8, 16, 112),
    "prefill": Work(1, 128, 0),
}


def our_models(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """The checkpoint as the stage `quantize` makes it by default, by the code that is measured."""
    default = {name: field.default for name, field in Quantize.model_fields.items()}
    int4 = Blockwise(default["block_size"])
    shutil.rmtree(folder, ignore_errors=True)
    source, made = folder / "fp32", {name: folder / name for name in ("int8-rowwise", "int4")}
    for path in (source, *made.values()):
        path.mkdir(parents=True)
    export_decoder(checkpoint, source, Cpu())
    quantize_graph(source, made["int8-rowwise"], "int8-rowwise", ROWWISE)
    quantize_graph(source, made["int4"], "int4", int4, dict.fromkeys(default["int8"], ROWWISE))
    return made


def peer_models(folder: Path, checkpoint: Path, python: Path) -> dict[str, Any]:
    """Write the peer's files on the first call; bytes of their matrices by part and type."""
    done = folder / "stored.json"
    if not done.is_file():
        write = [str(python), "-P", str(HERE / "peer_gguf.py"), str(checkpoint), str(folder)]
        found = subprocess.run(write, check=True, capture_output=True, text=True)
        done.write_text(found.stdout)
    return json.loads(done.read_text())


def measure(engine: Engine, work: Work) -> float:
    """Seconds for the steps of `work`, or for its prompts where it has none."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=10**6, ignore_eos=True)
    for index in range(work.batch):
        prompt = rng.integers(3, 1000, work.prompt).tolist()
        engine.submit(Request(str(index), prompt, params))
    start = time.perf_counter()
    while len(engine.step()) < work.batch:
        pass
    prefilled = time.perf_counter()
    for _ in range(work.steps):
        engine.step()
    decoded = time.perf_counter()
    for index in range(work.batch):
        engine.cancel(str(index))
    engine.step()
    return decoded - prefilled if work.steps else prefilled - start


def ask(peer: Worker, name: str, work: Work) -> float:
    """As `measure`, for a model of the peer."""
    request = {"batch": work.batch, "prompt": work.prompt, "tokens": work.steps}
    answer = peer.ask(model=name, **request)
    return answer["decode" if work.steps else "prefill"]


def take_turns(
    ours: dict[str, Engine], peer: Worker, turns: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each model by kind of work, turn by turn, to and fro."""
    timers: dict[str, Callable[[Work], float]] = {
        **{name: lambda work, e=engine: measure(e, work) for name, engine in ours.items()},
        **{name: lambda work, n=name: ask(peer, n, work) for name in TYPES},
    }
    found: dict[str, dict[str, list[float]]] = {kind: {n: [] for n in timers} for kind in WORK}
    for turn in range(turns + 1):
        for kind, work in WORK.items():
            for name in list(timers)[:: -1 if turn % 2 else 1]:
                speed = work.timed_tokens / timers[name](work)
                # The first turn warms all up.
                if turn:
                    found[kind][name].append(speed)
    return found


def compare(speeds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest speed of each model, and ratio of ours to the peer's."""
    ours = [name for name in speeds if name not in TYPES]
    ratios = {
        f"{name} / {theirs}": [a / b for a, b in zip(speeds[name], speeds[theirs], strict=True)]
        for name in ours
        for theirs in TYPES
    }
    return {
        name: {"median": statistics.median(v), "lowest": min(v), "highest": max(v)}
        for name, v in {**speeds, **ratios}.items()
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=int, default=9)
    add_threads(parser)
    args = parser.parse_args()
    folder = cache_dir() / "llama-135m"
    checkpoint = kept_llama(folder, SMOLLM2_135M)
    python = environment("llama-cpp", PEER, BUILD)
    stored = peer_models(folder / "gguf", checkpoint, python)
    options = EngineOptions(max(work.batch for work in WORK.values()), threads=args.threads)
    made = our_models(folder / "llama_cpp", checkpoint)
    engines: dict[str, Engine] = {n: OnnxEngine.open(path, options) for n, path in made.items()}
    with Worker(python, "peer_llama_cpp.py", str(folder / "gguf"), str(args.threads)) as peer:
        found = take_turns(engines, peer, args.turns)
    result = {kind: compare(speeds) for kind, speeds in found.items()}
    if args.json:
        print(json.dumps({"stored": stored, "speed": result}))
        return
    print("bytes of the peer's matrices:", stored)
    for kind, by_name in result.items():
        print(f"{kind}, tokens/s and ratios:")
        for name, r in by_name.items():
            print(f"  {name}: {r['median']:.4g} ({r['lowest']:.4g} to {r['highest']:.4g})")


if __name__ == "__main__":
    main()
