"""`make bench`: every measurement in turn; each can be run by itself with `python -m`."""

from __future__ import annotations

import subprocess
import sys

MEASUREMENTS = {
    "export_memory": "memory and time of exporting a 0.5B model, beside copying its bytes",
    "export_int4": "time and memory of making an int4 graph, beside onnxruntime-genai's builder",
    "kv_cache": "steps with caches in float32, int8 and int4, batch 8, contexts 16 to 900",
    "engine_decode": "decoding speed beside onnxruntime-genai, int4, batch 1 and 8",
    "graph_decode": "one step of our int4 graph beside one of its builder's, in one runtime without engines",
    "llama_cpp": "decoding and prefill beside llama.cpp, 8 and 4 bits, batch 1 and 8",
}


def main() -> int:
    """Run all of them; the exit code is that of the first that failed."""
    worst = 0
    for name, text in MEASUREMENTS.items():
        print(f"\n== {name}: {text}", flush=True)
        worst = worst or subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode
    print(
        "\nOn a run of the quickstart: python -m benchmarks.batch_invariance BUNDLE and "
        "python -m benchmarks.kill_resume quickstart; on a checkpoint: "
        "python -m benchmarks.quality FOLDER, python -m benchmarks.outlier FOLDER and "
        "python -m benchmarks.soak FOLDER; with a "
        "tokenizer.json: python -m benchmarks.constrained --tokenizer FILE and "
        "python -m benchmarks.json_schema SUITE FILE"
    )
    return worst


if __name__ == "__main__":
    sys.exit(main())
