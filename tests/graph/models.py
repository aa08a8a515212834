"""Tiny random models of every supported architecture, saved as Hugging Face folders."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu

VOCAB = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}
PHI3: dict[str, Any] = {"original_max_position_embeddings": 32, "pad_token_id": 0}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 7}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2 |= {"num_key_value_heads": 4}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
    ),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama-yarn-factor": (
        "llama",
        {"rope_parameters": YARN_ROPE | {"attention_factor": 0.8, "beta_fast": 4.0}},
    ),
    "llama-dynamic-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama-odd-heads": ("llama", {"head_dim": 24}),
    "llama-narrow": ("llama", {"hidden_size": 40, "head_dim": 16, "tie_word_embeddings": True}),
    "llama-relu": ("llama", {"hidden_act": "relu"}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "ministral": (
        "ministral",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 6,
            "head_dim": 16,
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2-mixed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-odd-heads": ("qwen3", {"head_dim": 8}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "smollm3-window": (
        "smollm3",
        {
            "no_rope_layer_interval": 2,
            "pad_token_id": 0,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "phi3": ("phi3", PHI3 | {"sliding_window": 9}),
    "phi3-partial": ("phi3", PHI3 | {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "phi3-long-rope": ("phi3", PHI3 | {"rope_parameters": LONG_ROPE}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", GEMMA | {"sliding_window_pattern": 2}),
    "gemma3_text-scaled": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "cohere2": ("cohere2", {"sliding_window": 6, "sliding_window_pattern": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-inner": ("gpt2", GPT2 | {"n_inner": 80, "activation_function": "relu"}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "gpt_neox-serial": (
        "gpt_neox",
        {"num_key_value_heads": 4, "use_parallel_residual": False, "attention_bias": False},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", MOE | {"num_experts": 4, "head_dim": 16}),
    "qwen3_moe-window": (
        "qwen3_moe",
        MOE | {"num_experts": 4, "use_sliding_window": True, "sliding_window": 6},
    ),
    "qwen3_moe-odd": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "head_dim": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
        },
    ),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        MOE | {"num_experts": 4, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
}
"""A name -> `model_type` and what differs from `SHAPE`."""


def make_model(name: str) -> PreTrainedModel:
    """The model of that name, freshly made."""
    model_type, changes = MODELS[name]
    config = AutoConfig.for_model(model_type, **SHAPE | copy.deepcopy(changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def save_model(name: str, folder: Path) -> PreTrainedModel:
    """Make the model of that name with all its parameters random, and save it."""
    torch.manual_seed(0)
    model = make_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights and biases too, which are made as ones and zeros.
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    model.save_pretrained(folder)
    return model


def torch_logits(model: PreTrainedModel, ids: list[int]) -> NDArray[np.float32]:
    """The logits after each of `ids`, [len, vocab], of one whole pass."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def export_quantized(checkpoint: Path, scheme: Scheme) -> Path:
    """Export a saved model and quantise all of it; the folder of the result."""
    fp32, out = checkpoint / "fp32", checkpoint / "quantized"
    fp32.mkdir()
    out.mkdir()
    export_decoder(checkpoint, fp32, Cpu())
    quantize_graph(fp32, out, "test", scheme)
    return out


def replace_matrices(
    model: PreTrainedModel, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    """Put `change(matrix)` in the place of every matrix of the model but the routers; those that a graph
    computes in one product are one matrix."""
    together: dict[str, list[NDArray[np.float32]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith(".mlp.gate.weight"):
            matrices = parameter.detach().numpy()
            group = re.sub(r"\b[qkv]_proj|\b(gate|up)_proj", "joined", name)
            together.setdefault(group, []).append(matrices.reshape(-1, matrices.shape[-1]))
    for parts in together.values():
        changed = change(np.concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        for part, new in zip(parts, np.split(changed, ends), strict=True):
            part[:] = new
