from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lifecycle.errors import StageError
from lifecycle.pipeline.artifact import hash_tree
from lifecycle.training.adapters import Lora
from lifecycle.training.models import without_renaming_warnings
from lifecycle.training.peft_folder import put_on, save_adapter
from tests.training.conftest import tiny_model

TOKENS = torch.arange(2, 12)[None]


def tuned() -> PeftModel:
    """LoRA on a tiny model, as if it had been trained."""
    torch.manual_seed(0)
    model = put_on(Lora(r=4), tiny_model()).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def test_only_the_adapter_is_trained_and_it_starts_as_nothing() -> None:
    model = put_on(Lora(r=4), tiny_model()).eval()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert torch.equal(model(TOKENS).logits, tiny_model().eval()(TOKENS).logits)


def test_peft_reads_back_what_is_written(tmp_path: Path) -> None:
    model = tuned()
    save_adapter(model, tmp_path / "adapter")
    with without_renaming_warnings():
        again = PeftModel.from_pretrained(tiny_model().eval(), str(tmp_path / "adapter"))
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_the_folder_is_the_same_every_time_and_names_no_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(tuned(), tmp_path / name)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ""
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("names", [("q_pro",), ("q_proj", "v_prj")])
def test_a_wrong_layer_is_named_with_those_there_are(names: tuple[str, ...]) -> None:
    with pytest.raises(StageError, match=r"did you mean '\w_proj'.*down_proj, gate_proj"):
        put_on(Lora(target_modules=names), tiny_model())


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_tied_layers_are_refused(name: str) -> None:
    with pytest.raises(StageError, match=f"{name}' shares its weights"):
        put_on(Lora(target_modules=("q_proj", name)), tiny_model(tie_word_embeddings=True))
    put_on(Lora(target_modules=("q_proj", name)), tiny_model())
