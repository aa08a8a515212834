"""One step of our int4 graph beside one of the onnxruntime-genai builder's, both run by the same ONNX Runtime.

    python -m benchmarks.graph_decode [--pairs 15] [--threads 2] [--json]

No engine and no generator: two graphs of the same random 135M-parameter Llama as two sessions of one process, with the
same options and the same kernels, those of the runtime; by turns, so many steps of each. Ours is as its builder's, every
matrix in 4 bits and blocks of 32, or as the stage `quantize` makes it by default, and as our kernels compute
that. A step decodes after 128 tokens, or computes a prompt of 512, with the logits of all tokens, which the builder's graph
gives as it is made. Above 1, ours is faster.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.arguments import add_threads, parser_of
from benchmarks.engine_decode import LONG_PROMPT, PEER, PROMPT, our_models, peer_model
from benchmarks.peers import cache_dir, environment
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.backend import Row
from lifecycle.engines.decoder import GRAPH
from lifecycle.engines.layout import pack
from lifecycle.engines.native.library import kernels_for
from lifecycle.engines.ort_session import PAST, open_session, present_name

CAPACITY = 1024
"""Tokens that the cache of each row has room for."""

Step = Callable[[], None]
Inputs = dict[str, np.ndarray[Any, Any]]


def our_inputs(batch: int, tokens: int) -> Inputs:
    """Of rows with so many new tokens: what an engine would give our graph."""
    start = 0 if tokens > 1 else PROMPT
    rows = [Row(slot, start, [5] * tokens, tokens) for slot in range(batch)]
    return dict(pack(rows, CAPACITY - tokens))


def their_inputs(batch: int, tokens: int) -> Inputs:
    """The same for the graph of the peer's builder."""
    whole = tokens if tokens > 1 else PROMPT + tokens
    ids, mask = np.full((batch, tokens), 5, np.int64), np.ones((batch, whole), np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def bound(session: ort.InferenceSession, inputs: Inputs, batch: int) -> Step:
    """A step over a cache of its own."""
    binding = session.io_binding()
    shape = batch, SMOLLM2_135M["num_key_value_heads"], CAPACITY, 64
    # Zeros that were never written are all one page of memory: attention over them looks faster than it is.
    filled = np.random.default_rng(0).standard_normal(shape, np.float32)
    for each in session.get_inputs():
        if not each.name.startswith(PAST):
            binding.bind_cpu_input(each.name, inputs[each.name])
            continue
        value = ort.OrtValue.ortvalue_from_numpy(filled.copy())
        binding.bind_ortvalue_input(each.name, value)
        binding.bind_ortvalue_output(present_name(each.name), value)
    binding.bind_output("logits")
    return lambda: session.run_with_iobinding(binding)


def compare(ours: dict[str, Step], theirs: Step, pairs: int, steps: int) -> dict[str, Any]:
    """Milliseconds of each, and the ratios of the turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ("peer", *ours)}
    every = {"peer": theirs, **ours}
    for turn in range(pairs + 1):
        # Those at the ends of an order that comes and goes are favoured: each is there as often.
        names = [*every][turn % len(every) :] + [*every][: turn % len(every)]
        for name in names if turn % 2 else reversed(names):
            begun = time.perf_counter()
            for _ in range(steps):
                every[name]()
            seconds[name].append((time.perf_counter() - begun) / steps)
    # The first turn warms all up.
    found = {name: 1000 * statistics.median(each[1:]) for name, each in seconds.items()}
    result: dict[str, Any] = {"peer": {"ms": found["peer"]}}
    for name in ours:
        pairs_of = zip(seconds["peer"][1:], seconds[name][1:], strict=True)
        ratios = sorted(peer / own for peer, own in pairs_of)
        result[name] = {
            "ms": found[name],
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
        }
    return result


def sessions(folder: Path, checkpoint: Path, threads: int) -> dict[str, ort.InferenceSession]:
    """All graphs, the peer's by that name."""
    python = environment("onnxruntime-genai", PEER)
    graphs = our_models(folder, checkpoint)
    found = {"peer": peer_model(folder, checkpoint, python, threads), **graphs}
    opened = {
        name: open_session(path / GRAPH, ["CPUExecutionProvider"], threads)
        for name, path in found.items()
    }
    if (kernels := kernels_for("auto")) is not None:
        for name, path in graphs.items():
            opened[f"{name}, our kernels"] = open_session(
                path / GRAPH, ["CPUExecutionProvider"], threads, kernels=kernels
            )
    return opened


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    add_threads(parser)
    args = parser.parse_args()
    folder = cache_dir() / "llama-135m"
    opened = sessions(folder, kept_llama(folder, SMOLLM2_135M), args.threads)
    peer = opened.pop("peer")
    result: dict[str, Any] = {}
    for what, batch, tokens in (("batch 1", 1, 1), ("batch 8", 8, 1), ("prefill", 1, LONG_PROMPT)):
        theirs = bound(peer, their_inputs(batch, tokens), batch)
        ours = {n: bound(s, our_inputs(batch, tokens), batch) for n, s in opened.items()}
        steps = args.steps if tokens == 1 else 1
        result[what] = compare(ours, theirs, args.pairs, steps)
    if args.json:
        print(json.dumps(result))
        return
    for what, found in result.items():
        print(f"{what}: the builder's graph {found.pop('peer')['ms']:.2f} ms")
        for name, r in found.items():
            span = f"{r['lowest']:.2f} to {r['highest']:.2f}"
            print(f"  {name}: {r['ms']:.2f} ms, ratio {r['ratio']:.2f} ({span})")


if __name__ == "__main__":
    main()
