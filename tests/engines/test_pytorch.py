from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.pytorch import CopyingBackend, TorchEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.errors import EngineError
from lifecycle.training.models import load_base
from tests.engines.conftest import Model
from tests.engines.test_pytorch_adapters import UNKNOWN, save_unknown
from tests.graph.models import VOCAB, save_model


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


@pytest.mark.parametrize("name", ["mistral-window", "recurrent_gemma"])
def test_what_cannot_be_copied_is_computed(name: str, tmp_path: Path) -> None:
    """A window forgets what is before it, and a state what it was made of."""
    (save_unknown if name in UNKNOWN else save_model)(name, tmp_path)
    text, params = np.random.default_rng(2).integers(3, VOCAB, 20).tolist(), SamplingParams(4)
    options = EngineOptions(prefill_chunk=8, prefix_cache_bytes=1 << 20)
    engine = TorchEngine.open(tmp_path, options)
    assert engine.generate([text], params) == engine.generate([text], params)
    assert engine.stats.prefix_hit_tokens == 0
    with pytest.raises(EngineError, match="cannot bound its cache: leave kv_cache_bytes out"):
        TorchEngine.open(tmp_path, EngineOptions(kv_cache_bytes=1 << 20))


def test_a_copy_that_fails_is_the_engines_error(random_model: Model) -> None:
    """It only costs what the copy would have saved."""
    backend = CopyingBackend(load_base(random_model.checkpoint))
    backend.forward([Row(0, 0, [5, 6, 7], 1)])
    block = backend.read_cache(0, 0, 3)
    assert block.nbytes == 3 * backend.bytes_per_token
    with pytest.raises(EngineError, match="PyTorch failed"):
        backend.write_cache(1, 0, block[:, 1:])


def test_a_text_in_parts_is_copied_in_the_end_once(random_model: Model) -> None:
    """Not whole for each part, also behind what a model has computed of it and taken back."""
    backend = CopyingBackend(load_base(random_model.checkpoint))
    text = np.random.default_rng(3).integers(3, 160, 64).tolist()
    backend.forward([Row(0, 0, text, 1)])
    wanted = backend.read_cache(0, 0, 64)
    backend.forward([Row(1, 0, text[:8], 1)])
    places: dict[int, set[int]] = {slot: set() for slot in range(4)}
    for slot, begin in ((0, 4), (1, 4), (2, 0), (3, 0)):
        backend.forget(slot, begin)
        for n in range(begin, 64):
            if slot == 3:
                backend.copy_cache(0, slot, n + 1, n)
            else:
                backend.write_cache(slot, n, wanted[n : n + 1])
            keys = backend._cache._caches[slot].layers[0].keys
            assert keys is not None
            places[slot].add(keys.data_ptr())
        assert np.array_equal(backend.read_cache(slot, begin, 64), wanted[begin:])
    assert [len(each) <= 7 for each in places.values()] == [True] * 4
    # How a prompt is cut shows in last bits: slot 1 is left out.
    logits = [backend.forward([Row(slot, 64, [9], 1)]) for slot in (0, 2, 3)]
    assert all(np.array_equal(each, logits[0]) for each in logits)
