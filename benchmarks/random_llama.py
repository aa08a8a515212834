"""Llama checkpoints with random weights, written tensor by tensor, for measurements of speed."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

DType = Literal["F32", "BF16"]

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
}
QWEN_HALF_BILLION: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4_864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}


def kept_llama(folder: Path, shape: dict[str, Any]) -> Path:
    """The checkpoint in `folder / "hf"`, written on the first call."""
    checkpoint = folder / "hf"
    if not (checkpoint / "model.safetensors").is_file():
        write_llama(checkpoint, shape)
    return checkpoint


def write_llama(folder: Path, shape: dict[str, Any], dtype: DType = "F32", seed: int = 0) -> None:
    """Write `config.json` and `model.safetensors` of a Llama of `shape`, normally distributed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype],
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shapes = dict(_shapes(config))
    width = {"F32": 4, "BF16": 2}[dtype]
    header: dict[str, Any] = {}
    end = 0
    for name, size in shapes.items():
        start, end = end, end + prod(size) * width
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for size in shapes.values():
            for start in range(0, prod(size), 1 << 22):
                count = min(1 << 22, prod(size) - start)
                values = random.standard_normal(count, np.float32) * np.float32(0.02)
                stored = values if dtype == "F32" else values.view(np.uint16)[1::2]
                file.write(stored.tobytes())


def _shapes(config: dict[str, Any]) -> list[tuple[str, list[int]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    block = {
        "input_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [kv, hidden],
        "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "post_attention_layernorm": [hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    layers = [
        (f"model.layers.{i}.{name}.weight", shape)
        for i in range(config["num_hidden_layers"])
        for name, shape in block.items()
    ]
    ends = [
        ("model.embed_tokens.weight", [config["vocab_size"], hidden]),
        ("model.norm.weight", [hidden]),
    ]
    return [*ends, *layers]
