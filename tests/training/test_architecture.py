from __future__ import annotations

from typing import Any

import pytest
import torch

from lifecycle.errors import StageError
from lifecycle.training.architecture import new_config
from tests.training.conftest import TINY, TOKENS, assert_same, tiny_model


def test_fields_reach_the_config() -> None:
    config = new_config(TINY, TOKENS)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 32, 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "no causal language model 'lama'; did you mean 'llama'"),
        ({"model_type": ""}, "model_type"),
        ({"hiden_size": 8}, "hiden_size: no field of LlamaConfig; did you mean 'hidden_size'"),
        ({"vocab_size": 8}, "vocab_size: the tokenizer decides it"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 33}, "not a multiple"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        new_config(TINY | changes, TOKENS)


def test_the_seed_decides_the_weights() -> None:
    assert_same(tiny_model(3).state_dict(), tiny_model(3).state_dict())
    first, second = tiny_model(3), tiny_model(4)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
