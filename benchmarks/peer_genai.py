"""Runs in the environment of onnxruntime-genai: decodes what `peers.Worker` asks for.

    python peer_genai.py MODEL_FOLDER

A request is `{"batch", "prompt", "tokens"}`: sequences, prompt tokens of each, new tokens of
each; the answer is `{"seconds", "first"}` for the new tokens after the first, and for that one.
"""

import json
import sys
import time

import numpy as np
import onnxruntime_genai as genai


def decode(model: genai.Model, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """Seconds for `tokens` decode steps of `batch` sequences, and for their prompts with a token each."""
    length = prompt + tokens + 1
    params = genai.GeneratorParams(model)
    params.set_search_options(
        batch_size=batch, do_sample=False, min_length=length, max_length=length
    )
    generator = genai.Generator(model, params)
    rng = np.random.default_rng(0)
    begun = time.perf_counter()
    generator.append_tokens(rng.integers(3, 1000, (batch, prompt), dtype=np.int32))
    generator.generate_next_token()
    start = time.perf_counter()
    for _ in range(tokens):
        generator.generate_next_token()
    return {"seconds": time.perf_counter() - start, "first": start - begun}


def main() -> None:
    model = genai.Model(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(decode(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
