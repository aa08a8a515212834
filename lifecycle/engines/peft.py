"""Reads the LoRA adapter of a PEFT folder for the slots of a graph.

What a slot cannot compute is refused with the reason: serving such an adapter without it would
give answers that nobody has evaluated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.adapters import AdapterLayout, Module, Product
from lifecycle.errors import CheckpointError, EngineError
from lifecycle.safetensors_file import StoredTensor, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_LARGEST_CONFIG = 1 << 22
"""Bytes; PEFT writes some thousand."""
_LARGEST_HEADER = 1 << 20
"""Bytes, of the file with weights: room for some 6,000 tensors, as PEFT calls them."""
_MOST_PATTERNS = 1024
"""Of `alpha_pattern`: every module is compared with each of them."""
_REPETITION = re.compile(r"(?<!\()[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_MOST_REPETITIONS = 3
"""In one pattern. What a backtracking match takes grows with the length of a module's name to this
power, and exponentially where a group is repeated."""

_PREFIX = "base_model.model."
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq")
_REFUSED = {
    "use_dora": "DoRA scales the sum of base weights and update, which a slot cannot",
    "use_qalora": "QA-LoRA pools the inputs of the update, which a slot does not",
    "lora_bias": "slots have no place for a bias of the update",
    "modules_to_save": "slots have no place for layers that were trained whole",
    "trainable_token_indices": "slots have no place for embeddings that were trained",
    "target_parameters": "slots have no place for updates of experts",
    "alora_invocation_tokens": "an activated LoRA begins within a text, a slot with it",
    "megatron_config": "slots know no tensor parallelism",
}
"""Fields of the configuration that change what is computed, and why it cannot be had."""

Floats = NDArray[np.float32]


class PeftFolder:
    """A LoRA adapter whose shapes fit a layout; the weights are yet to be read."""

    def __init__(self, folder: Path, layout: AdapterLayout) -> None:
        """Check all that can be checked without reading weights.

        Raises:
            EngineError: names the file and what does not fit, with both shapes.
        """
        self._folder, self._layout = folder, layout
        self._config = _read_config(folder)
        self._alpha, self._alphas = _read_alphas(folder / CONFIG, self._config)
        self._tensors = _read_tensors(folder)
        self._check_shapes()

    def update(self, product: Product, k: int) -> tuple[Floats, Floats] | None:
        """A transposed, [in, r], and B transposed and scaled, [r, out], of module `k` of a
        product; None if the adapter leaves it alone.

        Raises:
            EngineError: values that are not finite, or a damaged file.
        """
        module = product.modules[k]
        names = _names(module)
        if names[0] not in self._tensors:
            return None
        try:
            a, b = (self._tensors[name].read() for name in names)
        except CheckpointError as error:
            raise EngineError(str(error)) from error
        if product.heads:
            b = b.reshape(product.heads, 3, -1, b.shape[1]).swapaxes(0, 1).reshape(b.shape)
        with np.errstate(over="ignore"):
            scaled = b.T * np.float32(self._scale(module.name, len(a)))
        if not np.isfinite(scaled).all():
            raise EngineError(
                f"{self._folder / CONFIG}: lora_alpha makes values of {module.name} that are not finite"
            )
        return a.T, scaled

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r); as PEFT finds alpha for a module."""
        fitting = (a for pattern, a in self._alphas.items() if pattern.fullmatch(module))
        alpha = next(fitting, self._alpha)
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _check_shapes(self) -> None:
        file, rank, known = self._folder / WEIGHTS, self._layout.rank, set[str]()
        for product in self._layout.products:
            for module in product.modules:
                a, b = _names(module)
                known |= {a, b}
                found = [self._tensors[n].shape if n in self._tensors else None for n in (a, b)]
                if found == [None, None]:
                    continue
                r = found[0][0] if found[0] else 0
                wanted = [(r, product.width), (module.rows, r)]
                if found != wanted:
                    raise EngineError(
                        f"{file} does not fit the model: {module.name} has lora_A "
                        f"{_shown(found[0])} and lora_B {_shown(found[1])}; the model needs "
                        f"lora_A [r, {product.width}] and lora_B [{module.rows}, r]"
                    )
                if not r:
                    raise EngineError(f"{file}: {module.name} has rank 0, which is no adapter")
                if r > rank:
                    raise EngineError(
                        f"{file}: {module.name} has rank {r}, the slots have {rank}: export the "
                        f"model with adapters.rank {r} or more"
                    )
        if left := self._tensors.keys() - known:
            raise EngineError(
                f"{file}: tensor '{min(left)}' has no place in the slots ({len(left)} such), which "
                f"are for {_targets(self._layout.products)} of this model"
            )
        if not self._tensors:
            raise EngineError(f"{file} holds no tensors")


def _names(module: Module) -> tuple[str, str]:
    return tuple(f"{_PREFIX}{module.name}.lora_{which}.weight" for which in "AB")  # pyright: ignore[reportReturnType]


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _targets(products: Iterable[Product]) -> str:
    ends = (module.name.rpartition(".")[2] for product in products for module in product.modules)
    return ", ".join(dict.fromkeys(ends))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise EngineError(f"{path} is too large for a configuration")
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError:
        raise EngineError(f"{folder} is a file; name the folder that it lies in") from None
    except FileNotFoundError:
        inner = folder / "adapter"
        hint = f"; {inner} is one" if (inner / CONFIG).is_file() else ""
        raise EngineError(f"{folder} is no PEFT adapter: it has no {CONFIG}{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise EngineError(f"{path} is damaged: it holds no JSON object")
    config = cast("dict[str, Any]", found)
    if (kind := config.get("peft_type")) != "LORA":
        raise EngineError(f"{path}: peft_type is {kind!r:.80}; slots take LORA")
    for field, reason in _REFUSED.items():
        if config.get(field):
            raise EngineError(
                f"{path}: {field} is {config[field]!r:.80}: {reason}; merge it instead"
            )
    if (bias := config.get("bias", "none")) != "none":
        raise EngineError(
            f"{path}: bias is {bias!r:.80}: slots have no place for it; merge it instead"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_BASE):
        raise EngineError(
            f"{path}: init_lora_weights is {start!r:.80}, which changes the base weights; convert the "
            "adapter to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _read_alphas(path: Path, config: dict[str, Any]) -> tuple[float, dict[re.Pattern[str], float]]:
    """lora_alpha, and the values of it for modules whose paths end with a pattern."""
    patterns: object = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise EngineError(f"{path}: alpha_pattern is {patterns!r:.80}, expected an object")
    patterns = cast("dict[str, object]", patterns)
    if len(patterns) > _MOST_PATTERNS:
        raise EngineError(
            f"{path}: alpha_pattern has {len(patterns)} patterns; at most {_MOST_PATTERNS} are taken: let one "
            "fit several modules"
        )
    alphas: dict[re.Pattern[str], float] = {}
    for pattern, value in patterns.items():
        if _REPEATED_GROUP.search(pattern) or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS:
            raise EngineError(
                f"{path}: alpha_pattern has '{pattern:.80}', which could be tried for hours: spell it "
                "with fewer repetitions, and none of a group"
            )
        try:
            ending = re.compile(rf"(.*\.)?({pattern})")
        except (re.error, RecursionError, OverflowError) as error:
            raise EngineError(f"{path}: alpha_pattern has '{pattern:.80}': {error}") from None
        alphas[ending] = _number(path, f"alpha_pattern.{pattern}", value)
    return _number(path, "lora_alpha", config.get("lora_alpha", 8)), alphas


def _number(path: Path, name: str, value: object) -> float:
    try:
        if isinstance(value, int | float) and type(value) is not bool and math.isfinite(value):
            return float(value)
    except OverflowError:
        raise EngineError(f"{path}: {name:.80} is larger than any float") from None
    raise EngineError(f"{path}: {name:.80} is {value!r:.80}, expected a number")


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise EngineError(
                f"{pickled} is a pickle, which can run any code when it is read; save the adapter "
                "as safetensors"
            )
        raise EngineError(f"{file} is missing")
    try:
        return read_header(file, _LARGEST_HEADER)
    except CheckpointError as error:
        raise EngineError(str(error)) from error
