"""Putting an adapter on a model, and writing it in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from lifecycle.errors import StageError
from lifecycle.pipeline.suggest import did_you_mean
from lifecycle.training.adapters import Adapter
from lifecycle.training.models import without_renaming_warnings

WEIGHTS = "adapter_model.safetensors"


def put_on(adapter: Adapter, model: PreTrainedModel) -> PeftModel:
    """The model, frozen, with the untrained adapter on it.

    Raises:
        StageError: the adapter asks for layers that the model does not have.
    """
    config = adapter.peft_config()
    named: object = getattr(config, "target_modules", None)
    if isinstance(named, list | set | tuple):
        _require_modules(cast("list[str]", sorted(named)), model)
    try:
        with without_renaming_warnings():
            return cast("PeftModel", get_peft_model(model, config))
    except ValueError as error:
        raise StageError(f"adapter '{adapter.use}' does not fit the model: {error}") from error


def _require_modules(names: list[str], model: PreTrainedModel) -> None:
    """PEFT itself passes over a name as long as another one fits."""
    present = [name for name, _ in model.named_modules()]
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name in names:
        if not any(_is_named(known, [name]) for known in present):
            raise StageError(
                f"adapter: target_modules: the model has no '{name}'{did_you_mean(name, linear)} "
                f"(its linear layers: {', '.join(sorted(linear))}; or use all-linear)"
            )
    shared = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if model.config.tie_word_embeddings and module in shared and _is_named(name, names):
            raise StageError(
                f"adapter: target_modules: '{name}' shares its weights with another layer "
                "(tie_word_embeddings), so its update could never be merged; take it out"
            )


def _is_named(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; the same adapter always
    gives the same bytes."""
    folder.mkdir(parents=True)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config: PeftConfig = model.peft_config["default"]
    # The base lies beside the adapter; its path is nobody else's business.
    config.base_model_name_or_path = ""
    config.inference_mode = True
    targets: object = getattr(config, "target_modules", None)
    if isinstance(targets, set):
        # A set of names is written in another order by every process.
        setattr(config, "target_modules", sorted(cast("set[str]", targets)))  # noqa: B010
    config.save_pretrained(str(folder))
