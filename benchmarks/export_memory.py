"""Memory and time of exporting a 0.5B Llama to float32 ONNX, beside copying the same bytes.

    python -m benchmarks.export_memory [--json] [--folder DIR]

The model is random, written in DIR (default: a temporary folder; it takes 6 GB). Memory is the
peak resident size of the exporting process, less that of a process that only imports what the
export imports. Copying is `shutil.copyfile` of the exported weights on the same file system.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser_of
from benchmarks.random_llama import QWEN_HALF_BILLION, DType, write_llama

RUNS = 3


def main() -> None:
    """Measure both ways of storing the checkpoint and print the results."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, help="where the models are written")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        export(*arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = {dtype: measure(Path(folder), dtype) for dtype in ("F32", "BF16")}
    if arguments.json:
        print(json.dumps(results))
        return
    for dtype, found in results.items():
        print(
            f"{dtype:5} peak above imports {found['peak_mib']} MiB; export {found['seconds']} s, "
            f"copy {found['copy_seconds']} s, ratio {found['ratio']}"
        )


def export(source: Path, out: Path) -> None:
    """What a measured process does: import, export if there is a source, report."""
    from lifecycle.graph.check import check_graph
    from lifecycle.graph.export import export_decoder
    from lifecycle.graph.targets import Cpu

    started = time.perf_counter()
    if source.is_dir():
        export_decoder(source, out, Cpu())
        check_graph(out)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_kib": peak}))


def measure(root: Path, dtype: DType) -> dict[str, Any]:
    """Export and copy in turn; the fastest of each counts."""
    source, out = root / dtype, root / f"{dtype}-onnx"
    write_llama(source, QWEN_HALF_BILLION, dtype)
    idle = _child(root / "absent", out)
    exports, copies = [], []
    for _ in range(RUNS):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
        exports.append(_child(source, out))
        os.sync()
        started = time.perf_counter()
        shutil.copyfile(out / "model.onnx.data", root / "copy")
        copies.append(time.perf_counter() - started)
        (root / "copy").unlink()
    seconds, copied = min(run["seconds"] for run in exports), min(copies)
    peak = max(run["peak_kib"] for run in exports) - idle["peak_kib"]
    return {
        "bytes": (out / "model.onnx.data").stat().st_size,
        "peak_mib": round(peak / 1024),
        "seconds": round(seconds, 2),
        "copy_seconds": round(copied, 2),
        "ratio": round(seconds / copied, 2),
    }


def _child(source: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.export_memory", "--child", str(source), str(out)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


if __name__ == "__main__":
    main()
