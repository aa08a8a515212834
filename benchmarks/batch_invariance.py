"""Whether the greedy text of a request depends on what else is in the batch.

    python -m benchmarks.batch_invariance MODEL_FOLDER --mixes 500 --json

Each mix is a few requests of random lengths that arrive, and are sometimes cancelled, at random
steps; afterwards each of its requests runs alone. A request is identical if it gave the same
tokens, or, cancelled, a beginning of them. MODEL_FOLDER is an exported model or a bundle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.arguments import parser_of
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams


@dataclass(frozen=True)
class Arrival:
    """A request of a mix; times are steps of the engine."""

    prompt: list[int]
    params: SamplingParams
    arrives_at: int
    cancelled_at: int | None


def random_mix(rng: np.random.Generator, vocab_size: int, context: int) -> list[Arrival]:
    """2 to 12 requests: short and long prompts, within 40 steps, one in five cancelled."""
    mix: list[Arrival] = []
    for _ in range(rng.integers(2, 13)):
        longest = context // 2 if rng.random() < 0.3 else context // 8
        length = int(rng.integers(1, longest + 1))
        arrives_at = int(rng.integers(0, 40))
        stays = int(rng.integers(0, 30)) if rng.random() < 0.2 else None
        mix.append(
            Arrival(
                prompt=rng.integers(0, vocab_size, length).tolist(),
                params=SamplingParams(max_tokens=int(rng.integers(1, 33)), ignore_eos=True),
                arrives_at=arrives_at,
                cancelled_at=None if stays is None else arrives_at + stays,
            )
        )
    return mix


def run_mix(engine: Engine, mix: list[Arrival]) -> list[list[int]]:
    """The tokens that each request of a mix gave."""
    outputs: list[list[int]] = [[] for _ in mix]
    ended: set[int] = set()
    step = 0
    while len(ended) < len(mix):
        for index, arrival in enumerate(mix):
            if arrival.arrives_at == step:
                engine.submit(Request(str(index), arrival.prompt, arrival.params))
            if arrival.cancelled_at == step:
                engine.cancel(str(index))
        for event in engine.step():
            if event.token_id is not None:
                outputs[int(event.request_id)].append(event.token_id)
            if event.finish_reason is not None:
                ended.add(int(event.request_id))
        step += 1
    return outputs


def count_identical(engine: Engine, mix: list[Arrival]) -> int:
    """How many requests of a mix gave what they give alone."""
    count = 0
    for arrival, output in zip(mix, run_mix(engine, mix), strict=True):
        alone = engine.generate([arrival.prompt], arrival.params)[0].token_ids
        if arrival.cancelled_at is not None:
            alone = alone[: len(output)]
        count += tuple(output) == alone
    return count


def measure(engine: Engine, mixes: int, seed: int) -> tuple[int, int]:
    """Identical requests and all requests of `mixes` random mixes."""
    rng = np.random.default_rng(seed)
    identical = total = 0
    for _ in range(mixes):
        mix = random_mix(rng, engine.vocab_size, engine.max_model_len)
        identical += count_identical(engine, mix)
        total += len(mix)
    return identical, total


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, help="an exported model or a bundle")
    parser.add_argument("--mixes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--prefill-chunk", type=int, default=EngineOptions().prefill_chunk)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    options = EngineOptions(args.max_num_seqs, args.max_model_len, args.threads, args.prefill_chunk)
    engine = OnnxEngine.open(args.folder, options)
    identical, total = measure(engine, args.mixes, args.seed)
    result = {
        "scheme": DecoderInfo.load(args.folder).scheme,
        "mixes": args.mixes,
        "requests": total,
        "identical": identical,
        "share": identical / total,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{identical} of {total} requests identical ({result['share']:.2%})")


if __name__ == "__main__":
    main()
