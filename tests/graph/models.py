"""Tiny random models of every supported architecture, saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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


def _llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes))


MODELS = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-multi-head": lambda: _llama(num_key_value_heads=4),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": lambda: _llama(rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": lambda: _llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    ),
    "llama-odd-heads": lambda: _llama(head_dim=24),
    "llama-narrow": lambda: _llama(hidden_size=40, head_dim=16, tie_word_embeddings=True),
    "llama-relu": lambda: _llama(hidden_act="relu"),
    "llama-gelu": lambda: _llama(hidden_act="gelu"),
    "llama-gelu-tanh": lambda: _llama(hidden_act="gelu_pytorch_tanh"),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
    "mistral-full": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=0)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True)),
    "qwen3-odd-heads": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
}


def save_model(name: str, folder: Path) -> PreTrainedModel:
    """Make the model of that name with all its parameters random, and save it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
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
    """Put `change(matrix)` in the place of every matrix of the model."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            matrix = parameter.detach().numpy()
            matrix[:] = change(matrix)
