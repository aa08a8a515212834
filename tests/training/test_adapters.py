from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lifecycle.training.adapters import Adapter, Lora


class Holder(BaseModel):
    adapter: Adapter | None = Lora()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("lora", Lora()),
        ({"use": "lora", "r": 4}, Lora(r=4)),
        ({"use": "lora", "target_modules": ["q_proj"]}, Lora(target_modules=("q_proj",))),
        (None, None),
    ],
)
def test_a_recipe_picks_the_method(value: Any, expected: Adapter | None) -> None:
    assert Holder(adapter=value).adapter == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lor", "did you mean 'lora'"),
        ({"use": "lora", "rank": 4}, "rank"),
        ({"use": "lora", "r": 0}, "greater than or equal to 1"),
        ({"use": "lora", "target_modules": "q_proj"}, "all-linear"),
    ],
)
def test_what_cannot_work_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Holder(adapter=value)


def test_lora_in_the_terms_of_peft() -> None:
    config = Lora(r=8, alpha=4, dropout=0.1, rslora=True).peft_config()
    values = config.to_dict()
    assert (values["r"], values["lora_alpha"], values["lora_dropout"]) == (8, 4, 0.1)
    assert values["use_rslora"] is True
    assert values["target_modules"] == "all-linear"
