"""Adapters of the PyTorch engine, which PEFT has written, held to PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.errors import EngineError
from lifecycle.training.models import ADAPTER, load_base, without_renaming_warnings
from tests.graph.models import SHAPE, VOCAB, save_model

TEXT = np.random.default_rng(0).integers(3, VOCAB, 20).tolist()
KNOWN = ("llama-biases", "phi3", "gemma2", "gpt2", "gpt_neox")
EXPERTS = ("mixtral", "qwen3_moe")
UNKNOWN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 0},
    # Queries, keys and values are one layer.
    "falcon": {"multi_query": False, "new_decoder_architecture": False, "alibi": False},
    # Two of three layers are recurrent.
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 16, "pad_token_id": 0},
}
"""Models that cannot be exported."""

LORAS: list[dict[str, Any]] = [
    {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
    {
        "target_modules": r".*\.0\..*(q_proj|v_proj|c_attn|query_key_value|down_proj|linear_out)",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r".*\.(q_proj|c_attn|query_key_value)": 7},
        "alpha_pattern": {"q_proj": 21, "c_attn": 21, "query_key_value": 21},
    },
]


def save_unknown(name: str, folder: Path) -> None:
    config = AutoConfig.for_model(name, **(SHAPE | {"initializer_range": 0.2} | UNKNOWN[name]))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)


def save_adapter(base: Path, folder: Path, seed: int, lora: dict[str, Any]) -> None:
    """As PEFT writes it, with updates about as large as what they are added to."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(), without_renaming_warnings():
        # It has remarks on the layout of GPT-2's weights, and on models it knows nothing of.
        warnings.simplefilter("ignore")
        config = LoraConfig(**lora, task_type="CAUSAL_LM")
        model = get_peft_model(load_base(base), config)
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(tensor, std=0.5 / tensor.shape[1] ** 0.5)
        model.save_pretrained(str(folder))


@torch.inference_mode()
def peft_logits(base: Path, folder: Path) -> NDArray[np.float32]:
    with warnings.catch_warnings(), without_renaming_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_base(base), str(folder)).eval()
    return model(torch.tensor([TEXT])).logits[0].float().numpy()


@pytest.mark.parametrize("name", [*KNOWN, *EXPERTS, *UNKNOWN])
def test_a_batch_mixes_adapters_that_say_what_they_say_in_peft(name: str, tmp_path: Path) -> None:
    base = tmp_path / "hf"
    (save_unknown if name in UNKNOWN else save_model)(name, base)
    engine = TorchEngine.open(base, EngineOptions(max_num_seqs=8))
    plain = engine.logits(TEXT)
    wanted = [plain]
    for n, lora in enumerate(LORAS):
        if name in EXPERTS:
            lora = lora | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        save_adapter(base, tmp_path / str(n), n, lora)
        engine.load_adapter(str(n), tmp_path / str(n))
        wanted.append(peft_logits(base, tmp_path / str(n)))
    rows = [Row(slot, 0, TEXT, len(TEXT), adapter=n) for slot, n in enumerate((0, 2, 1, 3, 0))]
    found = engine.forward(rows).reshape(len(rows), len(TEXT), -1)
    for row, logits in zip(rows, found, strict=True):
        scale = max(1.0, np.abs(wanted[row.adapter]).max())
        np.testing.assert_allclose(logits, wanted[row.adapter], atol=1e-4 * scale)
    assert np.array_equal(found[0], plain) and np.array_equal(found[4], plain)
    assert all(np.abs(logits - plain).max() > 0.02 * np.abs(plain).max() for logits in wanted[1:])


def test_updates_of_experts_are_refused(tmp_path: Path) -> None:
    """PEFT makes them for every linear layer of such a model."""
    base, folder = tmp_path / "hf", tmp_path / "adapter"
    save_model("mixtral", base)
    save_adapter(base, folder, 0, LORAS[0])
    with pytest.raises(EngineError, match=r"target_parameters is .*updates of experts; merge it"):
        TorchEngine.open(base).load_adapter("a", folder)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_head_and_embeddings_have_no_slots(layer: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "hf", tmp_path / "adapter"
    save_model("llama", base)
    save_adapter(base, folder, 0, {"target_modules": [layer, "q_proj"]})
    with pytest.raises(EngineError, match=rf"{layer}.* has no place in the slots .*q_proj.*_proj"):
        TorchEngine.open(base).load_adapter("a", folder)


def test_an_adapter_comes_on_top_of_no_other(tmp_path: Path) -> None:
    """Neither of one beside the model; so an adapter gives the same in each engine."""
    base = tmp_path / "hf"
    save_model("llama", base)
    save_adapter(base, base / ADAPTER, 0, LORAS[0])
    wanted = peft_logits(base, base / ADAPTER)
    engine = TorchEngine.open(base)
    np.testing.assert_allclose(engine.logits(TEXT), wanted, atol=1e-4)
    with pytest.raises(EngineError, match="has an adapter beside it.*open its base model"):
        engine.load_adapter("a", base / ADAPTER)
