"""Runs in the environment of OpenVINO GenAI: converts a checkpoint, or serves what `peers.Worker` asks for.

    python peer_openvino.py convert CHECKPOINT FOLDER
    python peer_openvino.py serve FOLDER THREADS

`convert` writes FOLDER/int8 and FOLDER/int4. A request is `{"model", "requests"}`, each with `prompt`,
`output` and `arrival`; the answer is `{"seconds", "tokens"}`.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

WEIGHTS = {
    "int8": {"bits": 8, "sym": True},
    "int4": {"bits": 4, "sym": True, "group_size": 64, "ratio": 1.0},
}
"""8 bits per channel, 4 bits in groups of 64; the head is in 8 bits in both, as the peer does by default."""


def convert(checkpoint: Path, folder: Path) -> None:
    """Write both forms by the peer's exporter."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    for name, options in WEIGHTS.items():
        settings = OVWeightQuantizationConfig(**options)
        model = OVModelForCausalLM.from_pretrained(
            checkpoint, export=True, quantization_config=settings
        )
        model.save_pretrained(folder / name)


def main() -> None:
    folder = Path(sys.argv[2])
    if sys.argv[1] == "convert":
        convert(folder, Path(sys.argv[3]))
        return
    pipelines: dict[str, genai.ContinuousBatchingPipeline] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["model"]
        if name not in pipelines:
            pipelines[name] = open_pipeline(folder / name, int(sys.argv[3]))
        print(json.dumps(serve(pipelines[name], request["requests"])), flush=True)


def open_pipeline(folder: Path, threads: int) -> genai.ContinuousBatchingPipeline:
    """The peer's own scheduler, with prompts cut and mixed with decoding as it does by default."""
    config = genai.SchedulerConfig()
    config.max_num_seqs, config.cache_size = 16, 2
    properties = {"INFERENCE_NUM_THREADS": threads}
    return genai.ContinuousBatchingPipeline(str(folder), config, "CPU", properties)


def serve(pipeline, requests: list[dict]) -> dict:
    """Submit each request at its time, and step until all have ended."""
    left, handles, count = list(enumerate(requests)), [], 0
    start = time.perf_counter()
    while left or pipeline.has_non_finished_requests():
        while left and left[0][1]["arrival"] <= time.perf_counter() - start:
            index, request = left.pop(0)
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos = request["output"], True
            config.do_sample = False
            prompt = ov.Tensor(np.array([request["prompt"]], dtype=np.int64))
            handles.append(pipeline.add_request(index, prompt, config))
        if pipeline.has_non_finished_requests():
            pipeline.step()
        elif left:
            time.sleep(max(0.0, left[0][1]["arrival"] - (time.perf_counter() - start)))
    seconds = time.perf_counter() - start
    for handle in handles:
        count += len(handle.read_all()[0].generated_ids)
    return {"seconds": seconds, "tokens": count}


if __name__ == "__main__":
    main()
