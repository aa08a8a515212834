"""Memory of the ways to quantise that read calibration data, which work layer by layer.

    python -m benchmarks.quantize_memory [--shape 0.5b] [--layers 60] [--ways gptq awq] [--samples 16] [--json]

Each is a run of the command `lifecycle run` on a random Llama that was exported before: what is measured is the peak
of the memory that the process has for itself, in which pages of files that it maps do not count, less that of the
same stage without calibration (`rtn`). Beside it stand the bytes of the float32 model, of its largest layer, and of
that layer's activations over all texts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.arguments import parser_of
from benchmarks.random_llama import QWEN_HALF_BILLION, SMOLLM2_135M, write_llama

SHAPES = {"135m": SMOLLM2_135M, "0.5b": QWEN_HALF_BILLION}
_READS = {"calibration": "texts"}
WAYS: dict[str, dict[str, Any]] = {
    "rtn": {"scheme": "int4"},
    "gptq": {"scheme": "int4", "method": "gptq", **_READS},
    "awq": {"scheme": "int4", "method": "awq", **_READS},
    "mixed": {"scheme": "mixed", "budget": {"bits_per_weight": 5.2}, **_READS},
    "int8-static": {"scheme": "int8-static", **_READS},
    "smooth": {"scheme": "int8-rowwise", "smooth": 0.5, **_READS},
    "kv_cache": {"scheme": "int8-rowwise", "kv_cache": "int8", **_READS},
}


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--layers", type=int, help="as many instead of the shape's own")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers is not None:
        shape = shape | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, shape, args.samples, args.length)
        peaks: dict[str, int] = {}
        for way in dict.fromkeys(["rtn", *args.ways]):
            peaks[way], seconds = run(root, way)
            row = {
                "way": way,
                "seconds": round(seconds, 1),
                "peak_mib": peaks[way] >> 20,
                "beyond_rtn_mib": (peaks[way] - peaks["rtn"]) >> 20,
                **sizes(shape, args.samples * args.length),
            }
            print(json.dumps(row) if args.json else describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['way']:12} {row['seconds']:6.1f} s, peak {row['peak_mib']:5} MiB, {row['beyond_rtn_mib']:+5} MiB beyond "
        f"rtn; model {row['model_mib']} MiB, layer {row['layer_mib']}, activations {row['activations_mib']}"
    )


def sizes(shape: dict[str, Any], tokens: int) -> dict[str, int]:
    """In MiB: of the model, of a layer, and of what the layer computes of so many tokens, in float32."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * inner
    weights = shape["vocab_size"] * hidden + shape["num_hidden_layers"] * layer
    activations = tokens * (4 * hidden + 2 * kv + 3 * inner)
    return {
        "model_mib": 4 * weights >> 20,
        "layer_mib": 4 * layer >> 20,
        "activations_mib": 4 * activations >> 20,
    }


def prepare(root: Path, shape: dict[str, Any], samples: int, length: int) -> None:
    """A checkpoint that knows a thousand words, texts of these, and the export of the one."""
    write_llama(root / "hf", shape)
    words = {f"w{n}": n + 3 for n in range(1000)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2} | words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "hf" / "tokenizer.json"))
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    (root / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 1000, length)) for _ in range(2 * samples)]
    (root / "texts.txt").write_text("\n".join(texts))
    stages: dict[str, Any] = {
        "base": {"use": "checkpoint", "path": str(root / "hf")},
        "onnx": {"use": "export", "model": "base", "no_parity": "the weights are random"},
        "texts": {"use": "corpus", "path": str(root / "texts.txt"), "unit": "line"},
    }
    for way in WAYS:
        given = WAYS[way] | ({"samples": samples, "sample_length": length} if way != "rtn" else {})
        write_recipe(
            root / f"{way}.yaml", {**stages, "made": {"use": "quantize", "model": "onnx", **given}}
        )
    write_recipe(root / "first.yaml", stages)
    subprocess.run(command(root, "first"), check=True, capture_output=True)


def write_recipe(path: Path, stages: dict[str, Any]) -> None:
    # JSON is YAML.
    path.write_text(json.dumps({"stages": stages}))


def command(root: Path, name: str) -> list[str]:
    """What runs a recipe."""
    store = ["--store", str(root / "store")]
    tool = str(Path(sys.executable).with_name("lifecycle"))
    return [tool, "run", str(root / f"{name}.yaml"), *store]


def run(root: Path, way: str) -> tuple[int, float]:
    """The peak of a process's own memory in bytes, and how long it took."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command(root, way), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, own_bytes(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    return peak, seconds


def own_bytes(pid: int) -> int:
    """What a process has in memory that is no file's (Linux); 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
