"""Runs in the environment of onnxruntime-genai: serves what `peers.Worker` asks for.

    python peer_genai_engine.py FOLDER

A request is `{"model", "requests"}`, each with `prompt`, `output` and `arrival`; the answer is
`{"seconds", "tokens"}`.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai


def serve(engine: genai.Engine, requests: list[dict]) -> dict:
    """Submit each request at its time, and run until all have ended."""
    left, count, kept = list(requests), 0, []
    buffer = engine.create_event_buffer(1024)
    start = time.perf_counter()
    while left or engine.has_pending_requests():
        while left and left[0]["arrival"] <= time.perf_counter() - start:
            asked = left.pop(0)
            request = engine.create_request()
            options = genai.TurnOptions(request)
            options.set_do_sample(False)
            options.set_max_generated_tokens(asked["output"])
            options.set_min_generated_tokens(asked["output"])
            request.begin_turn(np.array(asked["prompt"], dtype=np.int32), options)
            kept.append(request)
        if engine.has_pending_requests():
            count += sum(bool(event.flags & TOKEN) for event in engine.run(buffer))
        elif left:
            time.sleep(max(0.0, left[0]["arrival"] - (time.perf_counter() - start)))
    seconds = time.perf_counter() - start
    for request in kept:
        request.close()
    return {"seconds": seconds, "tokens": count}


TOKEN = genai.EngineEventFlags.TOKEN


def main() -> None:
    engines: dict[str, genai.Engine] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["model"]
        if name not in engines:
            engines[name] = genai.Engine(genai.Model(str(Path(sys.argv[1], name))))
        print(json.dumps(serve(engines[name], request["requests"])), flush=True)


if __name__ == "__main__":
    main()
