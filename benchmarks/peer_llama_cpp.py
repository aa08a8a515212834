"""Runs in the environment of llama.cpp: computes what `peers.Worker` asks for.

    python peer_llama_cpp.py FOLDER THREADS

A request is `{"model", "batch", "prompt", "tokens"}`: the name of a GGUF file, sequences, prompt
tokens of each, steps in which each decodes one more; the answer is `{"prefill", "decode"}`, in
seconds. Token ids are given, not chosen, so that the time is that of the model alone.

Or it is `{"model", "requests"}`, each with `prompt`, `output` and `arrival`: they are served as they
come, by steps of a token for each that decodes and, beside those, of prompts up to the batch size, as
the peer's own server does. The answer is `{"seconds", "tokens"}`.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

CONTEXT = 256
"""Of each sequence; llama.cpp rounds up to it."""
BATCH = 512
"""Tokens of a step."""


class Model:
    """A GGUF file, and a context for each number of sequences."""

    def __init__(self, path: Path, threads: int) -> None:
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(
            bytes(path), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        self._contexts: dict[tuple[int, int], object] = {}

    def measure(self, batch: int, prompt: int, tokens: int) -> dict[str, float]:
        """Seconds for the prompts of all sequences, and for the steps after them."""
        context = self._context(batch, CONTEXT)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rng = np.random.default_rng(0)
        texts = rng.integers(3, 1000, (batch, prompt + tokens)).tolist()
        prompts = [Batch([(text[:prompt], 0, index)]) for index, text in enumerate(texts)]
        steps = [
            Batch([(text[at : at + 1], at, index) for index, text in enumerate(texts)])
            for at in range(prompt, prompt + tokens)
        ]
        times = [time.perf_counter()]
        for work in (prompts, steps):
            for step in work:
                step.run(context)
            times.append(time.perf_counter())
        return {"prefill": times[1] - times[0], "decode": times[2] - times[1]}

    def serve(self, requests: list[dict]) -> dict[str, float]:
        """Serve requests as they come."""
        longest = max(len(r["prompt"]) + r["output"] for r in requests)
        context = self._context(len(requests), -(-longest // CONTEXT) * CONTEXT)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        texts = [list(r["prompt"]) for r in requests]
        ends = [len(r["prompt"]) + r["output"] for r in requests]
        done = [0] * len(requests)
        start = time.perf_counter()
        while any(len(text) < end for text, end in zip(texts, ends, strict=True)):
            now, rows, room = time.perf_counter() - start, [], BATCH
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]) - done[i] > 1)
            for index in order:
                if requests[index]["arrival"] <= now and len(texts[index]) < ends[index]:
                    tokens = texts[index][done[index] : done[index] + room]
                    rows += [(tokens, done[index], index)] if tokens else []
                    room -= len(tokens)
            if not rows:
                time.sleep(min(r["arrival"] for r in requests if r["arrival"] > now) - now)
                continue
            Batch(rows).run(context)
            place = -1
            for tokens, at, index in rows:
                place += len(tokens)
                done[index] = at + len(tokens)
                if done[index] == len(texts[index]):
                    logits = llama_cpp.llama_get_logits_ith(context, place)
                    texts[index].append(int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax()))
        return {
            "seconds": time.perf_counter() - start,
            "tokens": sum(r["output"] for r in requests),
        }

    def _context(self, batch: int, length: int) -> object:
        if (batch, length) not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = batch * length, batch
            params.n_batch = BATCH
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[batch, length] = llama_cpp.llama_init_from_model(self._model, params)
        return self._contexts[batch, length]


class Batch:
    """Texts, each with the position of its first token and its sequence, as llama.cpp takes them;
    the last token of each asks for logits."""

    def __init__(self, rows: list[tuple[list[int], int, int]]) -> None:
        self._batch = llama_cpp.llama_batch_init(sum(len(row[0]) for row in rows), 0, 1)
        for tokens, position, sequence in rows:
            for index, token in enumerate(tokens):
                self._add(token, position + index, sequence, index == len(tokens) - 1)

    def _add(self, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch, at = self._batch, self._batch.n_tokens
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, wants_logits
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.n_tokens += 1

    def run(self, context: object) -> None:
        """Compute it, and wait for the logits."""
        if code := llama_cpp.llama_decode(context, self._batch):
            raise RuntimeError(f"llama_decode gave {code}")
        llama_cpp.llama_synchronize(context)

    def __del__(self) -> None:
        llama_cpp.llama_batch_free(self._batch)


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Pass on errors only."""
    if level == 4:
        sys.stderr.write(text.decode())


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    models: dict[str, Model] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("model")
        if name not in models:
            models[name] = Model(folder / f"{name}.gguf", threads)
        model = models[name]
        answer = model.serve(**request) if "requests" in request else model.measure(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
