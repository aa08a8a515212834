"""Speed, memory and quality of caches in float32, int8 and int4.

    python -m benchmarks.kv_cache --turns 9 --quality STORIES260K --json

Speed: steps in which 8 rows decode, at several contexts, on a 135M-parameter Llama with random weights
in row-wise int8. The caches take turns, step by step, in one process; a ratio is the median over the
turns of the time with float32 by the time with the other. Above 1, the other is faster.

Quality: of the model in `--quality`, over texts that it wrote itself, with weights in float32.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.arguments import add_threads, parser_of
from benchmarks.peers import cache_dir
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.ort_session import CACHE_TYPES
from lifecycle.engines.requests import SamplingParams
from lifecycle.evaluation.scoring import Scorer
from lifecycle.graph.cache import KvType, calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu

KINDS: tuple[KvType | None, ...] = (None, "int8", "int4")
CONTEXTS = (16, 128, 400, 900)
BATCH = 8
TEXT = 400
"""Tokens of a text that quality is measured on."""

Texts = Sequence[Sequence[int]]
Results = dict[str, dict[str, float]]


def make(
    folder: Path, checkpoint: Path, scheme: Scheme | None, texts: Texts | None = None
) -> dict[str, Path]:
    """The checkpoint with each kind of cache; random `texts` are made where none are given."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "export"
    source.mkdir(parents=True)
    export_decoder(checkpoint, source, Cpu())
    info = DecoderInfo.load(source)
    rng = np.random.default_rng(1)
    read: Texts = texts or rng.integers(3, info.vocab_size, (4, 128)).tolist()
    made: dict[str, Path] = {}
    for kind in KINDS:
        out = made[kind or "float32"] = folder / (kind or "float32")
        out.mkdir()
        cache = kind and calibrate_cache(Calibration(source, read), info, kind)
        quantize_graph(source, out, "fp32", scheme, cache=cache)
    return made


def step_times(models: dict[str, Path], turns: int, threads: int) -> dict[str, Results]:
    """Per context and cache: milliseconds of a step, and the ratio to float32."""
    options = EngineOptions(BATCH, max(CONTEXTS) + 8, threads)
    engines = {name: OnnxEngine.open(path, options) for name, path in models.items()}
    rng = np.random.default_rng(0)
    texts = rng.integers(3, 1000, (BATCH, max(CONTEXTS))).tolist()
    for engine in engines.values():
        # The cache must hold real numbers: pages that were never written are all one page.
        for slot, text in enumerate(texts):
            for start in range(0, len(text), options.prefill_chunk):
                chunk = text[start : start + options.prefill_chunk]
                engine.forward([Row(slot, start, chunk, 0)])
    found: dict[str, Results] = {}
    for context in CONTEXTS:
        rows = [Row(slot, context - 1, [5], 1) for slot in range(BATCH)]
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        # The first turns warm all up.
        for _ in range(turns + 2):
            for name, engine in engines.items():
                began = time.perf_counter()
                engine.forward(rows)
                seconds[name].append(time.perf_counter() - began)
        found[str(context)] = {
            name: {
                "ms": 1000 * statistics.median(ours[2:]),
                "ratio": statistics.median(
                    a / b for a, b in zip(seconds["float32"][2:], ours[2:], strict=True)
                ),
            }
            for name, ours in seconds.items()
        }
    for engine in engines.values():
        engine.close()
    return found


def bytes_per_token(folder: Path) -> int:
    """What a token takes in the cache."""
    info = DecoderInfo.load(folder)
    per_layer = 2 * info.num_kv_heads * info.cache_width
    return info.num_layers * per_layer * CACHE_TYPES[info.kv_dtype].itemsize


def write_texts(folder: Path, count: int, seed: int) -> list[list[int]]:
    """Texts that a model writes by chance, from its first token on."""
    engine, info = OnnxEngine.open(folder), DecoderInfo.load(folder)
    first = 1 if info.bos_token_id is None else info.bos_token_id
    params = [
        SamplingParams(max_tokens=TEXT - 1, temperature=1.0, seed=seed + i, ignore_eos=True)
        for i in range(count)
    ]
    written = engine.generate([[first]] * count, params)
    engine.close()
    return [[first, *text.token_ids] for text in written]


def quality(checkpoint: Path, folder: Path, lengths: Sequence[int]) -> dict[str, Results]:
    """Perplexity ratio and divergence of each cache, by the tokens of a text that scales were
    measured on."""
    plain = make(folder / "plain", checkpoint, None)["float32"]
    calibration, tested = write_texts(plain, 16, 0), write_texts(plain, 12, 1000)
    reference = OnnxEngine.open(plain)
    found: dict[str, Results] = {}
    for length in lengths:
        models = make(folder / "other", checkpoint, None, [t[:length] for t in calibration])
        found[str(length)] = {}
        for kind, path in models.items():
            engine, scorer = OnnxEngine.open(path), Scorer(2)
            for text in tested:
                ids = np.array(text)
                logits = [one.logits(text)[:-1] for one in (engine, reference)]
                scorer.add(ids[1:], logits)
            engine.close()
            ours, theirs = scorer.losses
            found[str(length)][kind] = {
                "perplexity_ratio": ours.perplexity / theirs.perplexity,
                "kl": scorer.agreement.kl,
                "top1_agreement": scorer.agreement.top1,
            }
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=int, default=21)
    add_threads(parser)
    parser.add_argument("--quality", type=Path, help="a Hugging Face folder of a trained decoder")
    args = parser.parse_args()
    folder = cache_dir() / "llama-135m"
    kept_llama(folder, SMOLLM2_135M)
    models = make(folder / "kv_cache", folder / "hf", Int8Rowwise(7))
    steps = step_times(models, args.turns, args.threads)
    memory = {name: bytes_per_token(path) for name, path in models.items()}
    scores = quality(args.quality, folder / "kv_quality", (64, TEXT)) if args.quality else {}
    if args.json:
        print(json.dumps({"steps": steps, "bytes_per_token": memory, "quality": scores}))
        return
    for context, by_cache in steps.items():
        for name, r in by_cache.items():
            print(f"context {context}, {name}: {r['ms']:.1f} ms a step, ratio {r['ratio']:.2f}")
    for name, size in memory.items():
        print(f"{name}: {size} bytes per token")
    for length, by_cache in scores.items():
        for name, r in by_cache.items():
            print(
                f"measured on {length} tokens, {name}: perplexity ratio {r['perplexity_ratio']:.4f}, "
                f"divergence {r['kl']:.4f} nats, same first choice {r['top1_agreement']:.1%}"
            )


if __name__ == "__main__":
    main()
