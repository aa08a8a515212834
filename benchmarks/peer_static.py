"""Serves what `peers.Worker` asks for with libraries that have no continuous batching.

    python peer_static.py convert CHECKPOINT FOLDER
    python peer_static.py ctranslate2 FOLDER THREADS
    python peer_static.py transformers CHECKPOINT THREADS

`convert` writes FOLDER/int8 for CTranslate2. It and `ctranslate2` run in the environment of CTranslate2,
`transformers` in this project's. A request is `{"model", "requests"}`: the name of what was converted, or
of a type of torch, and requests in the order of their arrival, each with `prompt`, `output` and `arrival`.
The answer is `{"seconds", "tokens"}`. All that have come are one batch, whenever the model is free.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctranslate2

Generate = Callable[[list[list[int]], list[int]], None]
"""Continue prompts, each by its number of tokens."""


def serve(generate: Generate, requests: list[dict]) -> dict:
    """Run what has come as one batch, until all is done."""
    left, count = list(requests), 0
    start = time.perf_counter()
    while left:
        now = time.perf_counter() - start
        batch = [request for request in left if request["arrival"] <= now]
        if not batch:
            time.sleep(left[0]["arrival"] - now)
            continue
        left = left[len(batch) :]
        outputs = [request["output"] for request in batch]
        generate([request["prompt"] for request in batch], outputs)
        count += sum(outputs)
    return {"seconds": time.perf_counter() - start, "tokens": count}


def convert(checkpoint: Path, folder: Path) -> None:
    """Write FOLDER/int8."""
    from ctranslate2.converters import TransformersConverter

    converter = TransformersConverter(str(checkpoint))
    converter.convert(str(folder / "int8"), quantization="int8", force=True)


def with_ctranslate2(folder: Path, name: str, threads: int) -> Generate:
    """Each text of a batch ends at its own length."""
    import ctranslate2

    words = json.loads((folder / name / "vocabulary.json").read_text())
    model = ctranslate2.Generator(str(folder / name), compute_type=name, intra_threads=threads)

    def generate(prompts: list[list[int]], outputs: list[int]) -> None:
        def is_over(result: ctranslate2.GenerationStepResult) -> bool:
            return result.step + 1 >= outputs[result.batch_id]

        model.generate_batch(
            [[words[token] for token in prompt] for prompt in prompts],
            max_length=max(outputs),
            min_length=max(outputs),
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=is_over,
        )

    return generate


def with_transformers(checkpoint: Path, name: str, threads: int) -> Generate:
    """Padded on the left; a batch ends with its longest text."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, name)).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], outputs: list[int]) -> None:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(outputs),
            min_new_tokens=max(outputs),
            do_sample=False,
            pad_token_id=0,
        )

    return generate


ENGINES = {"ctranslate2": with_ctranslate2, "transformers": with_transformers}


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "convert":
        convert(folder, Path(sys.argv[3]))
        return
    models: dict[str, Generate] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["model"]
        if name not in models:
            models[name] = ENGINES[what](folder, name, int(sys.argv[3]))
        print(json.dumps(serve(models[name], request["requests"])), flush=True)


if __name__ == "__main__":
    main()
