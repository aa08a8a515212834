from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.errors import EngineError
from tests.engines.conftest import Model


def test_the_published_story_comes_out(stories: Model, story: list[int]) -> None:
    engine = TorchEngine.open(stories.checkpoint)
    params = SamplingParams(max_tokens=len(story) - 1, ignore_eos=True)
    assert list(engine.generate([[1]], params)[0].token_ids) == story[1:]


def test_chunks_and_cache_equal_one_pass_over_the_text(random_model: Model) -> None:
    text = np.random.default_rng(0).integers(3, 160, 50).tolist()
    model = AutoModelForCausalLM.from_pretrained(random_model.checkpoint)
    with torch.inference_mode():
        expected = model(torch.tensor([text])).logits[0].numpy()
    engine = TorchEngine.open(random_model.checkpoint, EngineOptions(prefill_chunk=7))
    np.testing.assert_allclose(engine.logits(text), expected, atol=1e-4)


def test_it_generates_as_transformers_does(random_model: Model) -> None:
    text = np.random.default_rng(1).integers(3, 160, 20).tolist()
    model = AutoModelForCausalLM.from_pretrained(random_model.checkpoint)
    ids = torch.tensor([text])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False, pad_token_id=0
    )[0, 20:].tolist()
    engine = TorchEngine.open(random_model.checkpoint)
    result = engine.generate([text], SamplingParams(max_tokens=15))[0]
    assert list(result.token_ids) == [token for token in expected if token != 2]
    assert engine.eos_token_ids == frozenset({2}) and engine.max_model_len == 256


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=str(tmp_path)):
        TorchEngine.open(tmp_path)
