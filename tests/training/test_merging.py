from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lifecycle.errors import StageError
from lifecycle.pipeline.artifact import hash_file
from lifecycle.training import merging
from lifecycle.training.adapters import Lora
from lifecycle.training.merging import merge
from lifecycle.training.model_folder import stored_dtype
from lifecycle.training.models import ADAPTER, load_base, load_model
from lifecycle.training.peft_folder import put_on, save_adapter
from tests.training.conftest import tiny_model

TOKENS = torch.arange(2, 12)[None]


def write_tuned(folder: Path, dtype: torch.dtype, adapter: Lora, **changes: object) -> Path:
    """A base of some type with an adapter that matters."""
    base = tiny_model(**changes)
    base.to(dtype).save_pretrained(folder)  # pyright: ignore
    torch.manual_seed(0)
    model = put_on(adapter, load_base(folder))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_adapter(model, folder / ADAPTER)
    return folder


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_merged_answers_as_base_and_adapter_do(
    tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    model = write_tuned(tmp_path / "tuned", dtype, Lora(r=4))
    expected = load_model(model)(TOKENS).logits
    assert not torch.allclose(expected, load_base(model)(TOKENS).logits, atol=0.1)
    metrics = merge(model, tmp_path / "merged")
    assert metrics["max_logit_diff"] <= bound
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(TOKENS).logits, expected, atol=2 * bound, rtol=0)
    assert stored_dtype(tmp_path / "merged") == dtype


def test_other_files_are_those_of_the_base(tmp_path: Path) -> None:
    model = write_tuned(tmp_path / "tuned", torch.bfloat16, Lora(r=4))
    (model / "tokenizer.json").write_text("{}")
    (model / "training.json").write_text("{}")
    merge(model, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in model.iterdir()} - {ADAPTER}
    for name in names - {"model.safetensors"}:
        assert hash_file(model / name) == hash_file(tmp_path / "merged" / name)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "tuned" not in json.dumps(config)


def test_a_model_that_answers_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tuned(tmp_path / "tuned", torch.float32, Lora(r=4))

    def write_base(merged: object, base: Path, out: Path) -> None:
        load_base(base).save_pretrained(out)

    monkeypatch.setattr(merging, "write_tuned", write_base)
    with pytest.raises(StageError, match="answers differently.*tied"):
        merging.merge(model, tmp_path / "merged")
