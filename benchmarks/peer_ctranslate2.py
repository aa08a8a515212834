"""Runs in the environment of CTranslate2: converts a checkpoint, or serves what `peers.Worker` asks for.

    python peer_ctranslate2.py convert CHECKPOINT FOLDER
    python peer_ctranslate2.py serve FOLDER THREADS

A request is `{"model", "requests"}`, each with `prompt`, `output` and `arrival`; the answer is
`{"seconds", "tokens"}`. The library has no continuous batching: all that have come are one batch,
whenever the model is free.
"""

import json
import sys
import time
from pathlib import Path

import ctranslate2


def convert(checkpoint: Path, folder: Path) -> None:
    """Write FOLDER/int8."""
    from ctranslate2.converters import TransformersConverter

    converter = TransformersConverter(str(checkpoint))
    converter.convert(str(folder / "int8"), quantization="int8", force=True)


def serve(model: ctranslate2.Generator, words: list[str], requests: list[dict]) -> dict:
    """Run what has come as one batch, until all is done."""
    left, count = list(requests), 0
    start = time.perf_counter()
    while left:
        now = time.perf_counter() - start
        batch = [request for request in left if request["arrival"] <= now]
        left = [request for request in left if request["arrival"] > now]
        if not batch:
            time.sleep(0.001)
            continue
        outputs = [request["output"] for request in batch]
        model.generate_batch(
            [[words[token] for token in request["prompt"]] for request in batch],
            max_length=max(outputs),
            min_length=max(outputs),
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=Limit(outputs),
        )
        count += sum(outputs)
    return {"seconds": time.perf_counter() - start, "tokens": count}


class Limit:
    """Ends each text of a batch at its own length."""

    def __init__(self, outputs: list[int]) -> None:
        self._outputs = outputs

    def __call__(self, step: ctranslate2.GenerationStepResult) -> bool:
        return step.step + 1 >= self._outputs[step.batch_id]


def main() -> None:
    folder = Path(sys.argv[2])
    if sys.argv[1] == "convert":
        convert(folder, Path(sys.argv[3]))
        return
    models: dict[str, ctranslate2.Generator] = {}
    words = json.loads((folder / "int8" / "vocabulary.json").read_text())
    for line in sys.stdin:
        request = json.loads(line)
        name = request["model"]
        if name not in models:
            models[name] = ctranslate2.Generator(
                str(folder / name), compute_type=name, intra_threads=int(sys.argv[3])
            )
        print(json.dumps(serve(models[name], words, request["requests"])), flush=True)


if __name__ == "__main__":
    main()
