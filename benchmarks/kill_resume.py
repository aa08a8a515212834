"""Kill -9 a run at random moments; every repeated run must end with the same artifacts.

    python -m benchmarks.kill_resume --kills 30 quickstart [stage.field=value …]

One undisturbed run gives the digests and the time T that a run takes. Then, on a fresh store
each time, the same command is killed at a random moment of T and run again to its end. With
`--keep FOLDER` the stores of runs that end differently stay there, beside the undisturbed one.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser_of


def main() -> int:
    """Print a line per kill and a summary; 1 when any digest differs."""
    parser = parser_of(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the stores of runs that differ")
    args = parser.parse_intermixed_args()
    command = [sys.executable, "-m", "lifecycle.cli", "run", args.recipe, *args.overrides, "--json"]
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        begin = time.monotonic()
        expected = digests(command, folder / "undisturbed")
        whole = time.monotonic() - begin
        print(f"undisturbed: {whole:.1f} s, {len(expected)} artifacts", file=sys.stderr)
        results = [
            kill_once(command, folder / f"killed-{i}", moments.uniform(0, whole), expected)
            for i in range(args.kills)
        ]
    same = sum(r["same"] for r in results)
    if args.json:
        print(json.dumps({"kills": len(results), "same": same, "runs": results}))
    else:
        print(f"{same} of {len(results)} runs ended with the digests of the undisturbed run")
    return 0 if same == len(results) else 1


def kill_once(
    command: list[str], store: Path, moment: float, expected: dict[str, str]
) -> dict[str, Any]:
    """Kill one run after `moment` seconds, run it again, compare."""
    process = subprocess.Popen(
        [*command, "--store", str(store)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = len(list((store / "records").glob("*"))) if store.is_dir() else 0
    found = digests(command, store)
    differ = [name for name in expected if found.get(name) != expected[name]]
    print(f"killed at {moment:6.1f} s with {kept} stages done: {differ or 'same'}", file=sys.stderr)
    if not differ:
        shutil.rmtree(store)
    return {"moment": round(moment, 2), "done": kept, "same": not differ, "differ": differ}


def digests(command: list[str], store: Path) -> dict[str, str]:
    """Run to the end; the digest of every artifact by name."""
    done = subprocess.run([*command, "--store", str(store)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    return {name: stage["digest"] for name, stage in stages.items()}


if __name__ == "__main__":
    sys.exit(main())
