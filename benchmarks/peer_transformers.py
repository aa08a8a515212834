"""Runs in this project's environment: `generate` of transformers, for what `peers.Worker` asks.

    python peer_transformers.py FOLDER THREADS

A request is `{"model", "requests"}`: the name of a type of torch, and requests with `prompt`, `output`
and `arrival`; the answer is `{"seconds", "tokens"}`. All that have come are one batch, padded on the
left, whenever the model is free.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


@torch.inference_mode()
def serve(model: PreTrainedModel, requests: list[dict]) -> dict:
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
        width = max(len(request["prompt"]) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request["prompt"]) :] = torch.tensor(request["prompt"])
            mask[row, width - len(request["prompt"]) :] = 1
        longest = max(request["output"] for request in batch)
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
        )
        count += sum(request["output"] for request in batch)
    return {"seconds": time.perf_counter() - start, "tokens": count}


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    models: dict[str, PreTrainedModel] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["model"]
        if name not in models:
            dtype = getattr(torch, name)
            models[name] = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
        print(json.dumps(serve(models[name], request["requests"])), flush=True)


if __name__ == "__main__":
    main()
