"""A LoRA adapter of random numbers in PEFT's format, for what must hold of every adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lifecycle.engines.adapters import AdapterLayout


def write_random_adapter(
    folder: Path, layout: AdapterLayout, seed: int, rank: int | None = None
) -> None:
    """Write an adapter of all modules of `layout` whose updates are about as large as what they
    are added to. Without a `rank`, that of the slots where `seed` is even, else half of it with
    the scale of rsLoRA."""
    is_half = seed % 2 == 1
    rank = rank or max(1, layout.rank // (1 + is_half))
    random = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    modules: list[str] = []
    for product in layout.products:
        for module in product.modules:
            modules.append(module.name)
            name = f"base_model.model.{module.name}.lora_"
            a = random.standard_normal((rank, product.width)) / np.sqrt(product.width)
            b = random.standard_normal((module.rows, rank)) / np.sqrt(rank)
            tensors[f"{name}A.weight"] = a.astype(np.float32)
            tensors[f"{name}B.weight"] = b.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 0.3 * rank,
        "use_rslora": is_half,
        "target_modules": modules,
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
