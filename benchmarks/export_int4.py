"""Time and memory of making an int4 graph from a checkpoint, beside onnxruntime-genai's builder.

    python -m benchmarks.export_int4 [--turns 3] [--json]

Random Llamas of 135M and 0.5B parameters, every matrix in 4 bits with blocks of 32, on both sides.
Each is a process of its own, timed from its start to its end; memory is its peak resident size. They
take turns; the ratios are medians over the turns. Below 1, this project is faster or smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser_of
from benchmarks.engine_decode import PEER, write_tokenizer
from benchmarks.peers import environment
from benchmarks.random_llama import QWEN_HALF_BILLION, SMOLLM2_135M, write_llama

MODELS = {"135M": SMOLLM2_135M, "0.5B": QWEN_HALF_BILLION}


def main() -> None:
    """Measure both models and print the results."""
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are written")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        export(*args.child)
        return
    python = environment("onnxruntime-genai", PEER)
    found = {
        name: measure(shape, python, args.turns, args.folder) for name, shape in MODELS.items()
    }
    if args.json:
        print(json.dumps(found))
        return
    for name, r in found.items():
        print(
            f"{name}: {r['seconds']:.1f} s and {r['mib']:.0f} MiB, onnxruntime-genai "
            f"{r['peer_seconds']:.1f} s and {r['peer_mib']:.0f} MiB; ratios "
            f"{r['time_ratio']:.2f} and {r['memory_ratio']:.2f}"
        )


def export(source: Path, out: Path) -> None:
    """What a measured process of ours does."""
    from lifecycle.graph.blockwise import Blockwise
    from lifecycle.graph.export import export_decoder
    from lifecycle.graph.quantize import quantize_graph
    from lifecycle.graph.targets import Cpu

    full, int4 = out / "fp32", out / "int4"
    for folder in (full, int4):
        folder.mkdir(parents=True)
    export_decoder(source, full, Cpu())
    quantize_graph(full, int4, "int4", Blockwise(32), {})


def measure(
    shape: dict[str, Any], python: Path, turns: int, folder: Path | None
) -> dict[str, float]:
    """Medians of seconds and of MiB for both, and of the ratios."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        write_llama(root / "hf", shape)
        write_tokenizer(root / "hf")
        ours = [sys.executable, "-m", "benchmarks.export_int4", "--child"]
        ours += [str(root / "hf"), str(root / "ours")]
        peer = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(root / "hf")]
        peer += ["-o", str(root / "genai"), "-p", "int4", "-e", "cpu", "-c", str(root / "cache")]
        peer += ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
        runs: list[tuple[float, float, float, float]] = []
        for _ in range(turns):
            for left in ("ours", "genai", "cache"):
                shutil.rmtree(root / left, ignore_errors=True)
            runs.append((*_timed(ours), *_timed(peer)))
    median = statistics.median
    return {
        "seconds": median(run[0] for run in runs),
        "mib": median(run[1] for run in runs),
        "peer_seconds": median(run[2] for run in runs),
        "peer_mib": median(run[3] for run in runs),
        "time_ratio": median(run[0] / run[2] for run in runs),
        "memory_ratio": median(run[1] / run[3] for run in runs),
    }


def _timed(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a process."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(errors.decode())
    return seconds, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
