"""Pooled hidden states against transformers, and what becomes of them in quantised graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.batched import BatchedEngine
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import EngineError, RequestError
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.half import Half
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu
from tests.engines.conftest import Model
from tests.engines.toy import ToyEngine
from tests.graph.models import save_model

LENGTHS = (1, 40, 16, 90, 17, 3, 33)


def prompts(vocab: int = 96) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, length).tolist() for length in LENGTHS]


def by_transformers(checkpoint: Path, texts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    """The last hidden states of each text, [tokens, hidden]."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).base_model
    with torch.inference_mode():
        return [model(torch.tensor([text])).last_hidden_state[0].numpy() for text in texts]


@pytest.fixture(scope="module")
def stories_with_states(stories: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = tmp_path_factory.mktemp("states")
    export_decoder(stories.checkpoint, graph, Cpu(), hidden_states=True)
    return graph


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied",
        "granite",
        "gemma2",
        "gpt2",
        "phi3-long-rope",
        "qwen2-window",
        "cohere2",
    ],
)
def test_both_engines_pool_what_transformers_gives(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path / "hf")
    (tmp_path / "onnx").mkdir()
    export_decoder(tmp_path / "hf", tmp_path / "onnx", Cpu(), hidden_states=True)
    states = by_transformers(tmp_path / "hf", prompts())
    options = EngineOptions(max_num_seqs=3, prefill_chunk=16)
    engines: list[BatchedEngine] = [
        OnnxEngine.open(tmp_path / "onnx", options),
        TorchEngine.open(tmp_path / "hf", options),
    ]
    wanted = {
        "mean": np.stack([each.mean(axis=0) for each in states]),
        "last": np.stack([each[-1] for each in states]),
        "cls": np.stack([each[0] for each in states]),
    }
    for engine in engines:
        for pooling, vectors in wanted.items():
            found = engine.embed(prompts(), pooling, normalize=False)  # pyright: ignore[reportArgumentType]
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, vectors, atol=1e-4)


def test_stories_have_vectors_of_length_1(stories: Model, stories_with_states: Path) -> None:
    texts = prompts(512)
    means = [each.mean(axis=0) for each in by_transformers(stories.checkpoint, texts)]
    found = OnnxEngine.open(stories_with_states).embed(texts)
    wanted = np.stack([mean / np.linalg.norm(mean) for mean in means])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_text_gets_the_same_bits_alone_and_among_others(stories_with_states: Path) -> None:
    engine = OnnxEngine.open(stories_with_states, EngineOptions(max_num_seqs=3, prefill_chunk=16))
    texts, params = prompts(512), SamplingParams(max_tokens=5)
    before = engine.generate(texts[:2], params)
    for pooling in ("mean", "last"):
        together = engine.embed(texts, pooling)
        alone = np.concatenate([engine.embed([text], pooling) for text in texts])
        assert np.array_equal(together, alone)
    assert engine.embed([]).shape == (0, 64)
    assert engine.generate(texts[:2], params) == before


def test_the_other_graphs_stay_as_they_are(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "hf")
    for name, hidden_states in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        export_decoder(
            tmp_path / "hf", tmp_path / name, Cpu(), slots=(2, 4), hidden_states=hidden_states
        )
    files = {path.name for path in (tmp_path / "without").iterdir()}
    for name in files:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    more = {path.name for path in (tmp_path / "with").iterdir()} - files
    assert more == {"hidden.onnx"}


@pytest.mark.parametrize("scheme", [Int8Rowwise(weight_bits=8), Half("fp16"), Blockwise()])
def test_quantised_graphs_keep_them(
    stories_with_states: Path, stories: Model, tmp_path: Path, scheme: Scheme
) -> None:
    quantize_graph(stories_with_states, tmp_path, "test", scheme)
    texts = prompts(512)
    wanted = OnnxEngine.open(stories_with_states).embed(texts)
    found = OnnxEngine.open(tmp_path).embed(texts)
    likeness = (found * wanted).sum(axis=1)
    assert likeness.min() > (0.9 if isinstance(scheme, Blockwise) else 0.99)
    (tmp_path / "plain").mkdir()
    quantize_graph(stories.graph, tmp_path / "plain", "test", scheme)
    same = tmp_path / "plain" / "model.onnx"
    assert (tmp_path / "model.onnx").read_bytes() == same.read_bytes()


def test_models_without_them_say_how_to_get_them(stories: Model) -> None:
    engine = OnnxEngine.open(stories.graph)
    with pytest.raises(EngineError, match="export the model with hidden_states: true"):
        engine.embed([[1]])
    assert engine.generate([[1]], SamplingParams(max_tokens=2))
    with pytest.raises(EngineError, match="this engine gives no hidden states"):
        ToyEngine.make().embed([[1]])


def test_what_cannot_be_embedded_is_refused(stories_with_states: Path) -> None:
    engine = OnnxEngine.open(stories_with_states)
    with pytest.raises(RequestError, match="pooling is 'max'; it must be"):
        engine.embed([[1]], "max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="prompt 1: the prompt is empty"):
        engine.embed([[1], []])
    engine.submit(Request("a", [1]))
    with pytest.raises(EngineError, match="busy"):
        engine.embed([[1]])
