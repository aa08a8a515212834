from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lifecycle.engines.backend import Row
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import FinishReason, Request, SamplingParams
from lifecycle.engines.state import LONGEST_RUN
from lifecycle.errors import EngineError, RequestError
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from tests.engines.conftest import Model

FREE = SamplingParams(max_tokens=20, ignore_eos=True)


def prompts(vocab: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def engine(random_model: Model) -> Engine:
    return OnnxEngine.open(random_model.graph, EngineOptions(prefill_chunk=16, max_num_seqs=4))


def test_the_published_story_comes_out_alone_and_among_seven_others(
    stories: Model, story: list[int]
) -> None:
    engine = OnnxEngine.open(stories.graph)
    params = SamplingParams(max_tokens=len(story) - 1, ignore_eos=True)
    others = prompts(512, [5, 200, 129, 17, 250, 1, 64])
    alone = engine.generate([[1]], params)[0]
    among = engine.generate([*others[:3], [1], *others[3:]], params)[3]
    assert list(alone.token_ids) == list(among.token_ids) == story[1:]


def test_logits_equal_those_of_pytorch_whatever_the_chunks(random_model: Model) -> None:
    text = prompts(160, [100])[0]
    expected = TorchEngine.open(random_model.checkpoint).logits(text)
    for chunk in (1, 7, 64, 128):
        engine = OnnxEngine.open(random_model.graph, EngineOptions(prefill_chunk=chunk))
        np.testing.assert_allclose(engine.logits(text), expected, atol=1e-4)


def test_batched_generation_equals_pytorch(random_model: Model, engine: Engine) -> None:
    texts = prompts(160, [1, 40, 16, 17, 90, 3, 33])
    reference = TorchEngine.open(random_model.checkpoint)
    assert engine.generate(texts, FREE) == reference.generate(texts, FREE)


def test_what_is_no_folder_is_not_opened(random_model: Model, tmp_path: Path) -> None:
    file = random_model.graph / "model.onnx"
    with pytest.raises(EngineError, match=r"model\.onnx is a file: name the folder"):
        OnnxEngine.open(file)
    with pytest.raises(EngineError, match="none does not exist: name the folder"):
        OnnxEngine.open(
            random_model.graph, EngineOptions(draft_tokens=2, draft_model=tmp_path / "none")
        )


def test_a_seeded_request_gives_the_same_text_beside_others(engine: Engine) -> None:
    texts = prompts(160, [12, 30, 50])
    seeded = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    free = SamplingParams(max_tokens=25, temperature=1.0, ignore_eos=True)
    alone = engine.generate(texts[:1], seeded)[0]
    assert engine.generate(texts[::-1], [free, free, seeded])[2] == alone


def test_what_an_earlier_text_left_in_a_slot_is_never_read(random_model: Model) -> None:
    engine = OnnxEngine.open(random_model.graph, EngineOptions(max_num_seqs=2))
    texts = prompts(160, [30, 20])
    expected = engine.generate(texts, FREE)
    for cache in engine._backend.cache.rows(2).values():  # type: ignore[attr-defined]
        cache[:] = np.nan
    assert engine.generate(texts, FREE) == expected


def test_a_failure_of_the_runtime_ends_its_requests_and_the_engine_goes_on(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lifecycle.engines.ort_backend as module

    engine = OnnxEngine.open(random_model.graph)
    text = prompts(160, [10])[0]
    expected = engine.generate([text], FREE)
    honest = module.pack

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(module, "pack", honest)
        return honest(*args) | {"input_ids": np.array([[10**6] * 10])}

    monkeypatch.setattr(module, "pack", broken)
    engine.submit(Request("a", text, FREE))
    event = engine.step()[0]
    assert event.finish_reason is FinishReason.ERROR and "ONNX Runtime failed" in event.error
    assert engine.generate([text], FREE) == expected


def test_the_context_can_be_filled_to_its_end(random_model: Model) -> None:
    engine = OnnxEngine.open(random_model.graph, EngineOptions(max_model_len=40))
    text = prompts(160, [39])[0]
    assert len(engine.generate([text], FREE)[0].token_ids) == 1
    assert engine.logits([*text, 5]).shape == (40, 160)
    with pytest.raises(RequestError, match="at most 39"):
        engine.generate([[*text, 5]], FREE)


def test_a_text_near_its_end_runs_beside_a_prompt_chunk(random_model: Model) -> None:
    engine = OnnxEngine.open(random_model.graph, EngineOptions(max_model_len=64))
    texts = prompts(160, [60, 60])
    alone = [engine.generate([text], FREE)[0] for text in texts]
    engine.submit(Request("0", texts[0], FREE))
    engine.step()
    engine.submit(Request("1", texts[1], FREE))
    tokens: list[list[int]] = [[alone[0].token_ids[0]], []]
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            assert event.token_id is not None
            tokens[int(event.request_id)].append(event.token_id)
    assert [tuple(row) for row in tokens] == [result.token_ids for result in alone]


@pytest.mark.parametrize(("chunk", "draft_tokens"), [(1, 0), (4, 100), (64, 0)])
def test_a_full_text_runs_beside_the_widest_row(
    random_model: Model, chunk: int, draft_tokens: int
) -> None:
    """A chunk of a prompt, or what a constraint forced with guesses behind it."""
    options = EngineOptions(
        max_num_seqs=2, max_model_len=126, prefill_chunk=chunk, draft_tokens=draft_tokens
    )
    engine = OnnxEngine.open(random_model.graph, options)
    text, other = prompts(160, [126, max(chunk, LONGEST_RUN) + draft_tokens])
    alone = engine.logits(text)[-1]
    engine.forward([Row(0, 0, text[:-1], 0)])
    beside = engine.forward([Row(0, 125, text[-1:], 1), Row(1, 0, other, 1)])[0]
    np.testing.assert_allclose(beside, alone, atol=1e-4)


def test_all_steps_write_their_logits_into_the_same_memory(random_model: Model) -> None:
    """Each number of slots is bound by itself: long prompts that are scored would take it for each."""
    engine = OnnxEngine.open(random_model.graph, EngineOptions(8))
    rng, found = np.random.default_rng(0), list[Any]()
    texts = rng.integers(3, 160, (8, 40)).tolist()
    for turn in range(2):
        for slot, text in enumerate(texts):
            logits = engine.forward([Row(slot, 0, text, 40 if turn else 1 + slot)])
            found.append(logits.base)
            np.testing.assert_array_equal(logits[-1], engine.forward([Row(0, 0, text, 1)])[0])
    assert len({id(base) for base in found[8:]}) == 1 and len(found[-1]) < 100


def test_the_model_says_where_texts_end(engine: Engine, stories: Model) -> None:
    assert engine.eos_token_ids == frozenset({2})
    assert engine.vocab_size == 160 and engine.max_model_len == 256
    assert OnnxEngine.open(stories.graph).max_model_len == 512


@pytest.fixture
def copy(random_model: Model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_model.graph, tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "decoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "decoder.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(EngineError, match=name):
        OnnxEngine.open(copy)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "decoder.json"])
def test_a_cut_file_is_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    with pytest.raises(EngineError, match=r"model\.onnx|decoder\.json"):
        OnnxEngine.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, r"tensor 'past_key_values\.0\.key'"),
        ({"head_size": 8}, r"tensor 'past_key_values\.0\.key'"),
        ({"num_layers": 3}, r"tensor 'past_key_values\.2\.key'"),
        ({"num_layers": 1}, r"tensor 'past_key_values\.1\.key'"),
        ({"vocab_size": 7}, "tensor 'logits'"),
        ({"kv_dtype": "int8"}, r"tensor 'past_key_values\.0\.key'"),
        ({"kv_dtype": "int2"}, "int2 cache; this engine runs float32, int8, int4"),
        ({"format": 99}, "format 99"),
        ({"providers": ["NoSuchProvider"]}, "made for NoSuchProvider"),
        ({"providers": "CPUExecutionProvider"}, r"providers is 'CPU.*expected tuple\[str"),
        ({"num_layers": "2"}, "num_layers is '2', expected int"),
        ({"num_layers": True}, "num_layers is True"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"eos_token_ids": 2}, "eos_token_ids is 2"),
        ({"eos_token_ids": ["2"]}, "eos_token_ids"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"scheme": None}, "scheme is None"),
    ],
)
def test_a_graph_that_is_not_what_its_description_says_is_refused(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    edit(copy, **changes)
    with pytest.raises(EngineError, match=message):
        OnnxEngine.open(copy)


@pytest.mark.parametrize("name", ["architecture", "hidden_size", "num_layers", "bos_token_id"])
def test_a_description_without_a_field_is_refused(copy: Path, name: str) -> None:
    path = copy / "decoder.json"
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))
    with pytest.raises(EngineError, match=rf"decoder\.json is damaged: {name} is missing"):
        OnnxEngine.open(copy)


@pytest.mark.parametrize("content", ["[]", "3", "{}", "null"])
def test_a_description_that_is_no_object_is_refused(copy: Path, content: str) -> None:
    (copy / "decoder.json").write_text(content)
    with pytest.raises(EngineError, match=r"decoder\.json is damaged"):
        OnnxEngine.open(copy)


def test_weights_outside_the_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    shutil.move(copy / "model.onnx.data", tmp_path / "elsewhere")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="outside its own folder"):
        OnnxEngine.open(copy)


def test_a_context_longer_than_the_models_is_refused(random_model: Model) -> None:
    with pytest.raises(EngineError, match="max_model_len is 257"):
        OnnxEngine.open(random_model.graph, EngineOptions(max_model_len=257))


@pytest.mark.parametrize("changes", [{"max_num_seqs": 10**8}, {"prefill_chunk": 10**20}])
def test_a_cache_that_no_memory_holds_is_refused(
    random_model: Model, changes: dict[str, int]
) -> None:
    with pytest.raises(EngineError, match=r"cache of \d+ MiB .*lower max_num_seqs"):
        OnnxEngine.open(random_model.graph, EngineOptions(**changes))


def test_a_system_that_knows_no_usable_cores_takes_all(
    random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert OnnxEngine.open(random_model.graph).vocab_size == 160


def test_a_fork_has_a_cache_of_its_own() -> None:
    code = (
        "import os; from lifecycle.engines.slot_cache import lazy_memory\n"
        "import numpy; zeros = numpy.frombuffer(lazy_memory(16), numpy.float32)\n"
        "if child := os.fork():\n"
        "    os.waitpid(child, 0); print(zeros.tolist())\n"
        "else:\n"
        "    zeros[:] = 1; os._exit(0)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([0.0] * 4)


def test_neither_torch_nor_transformers_is_imported(random_model: Model) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from lifecycle.engines.ort import OnnxEngine, EngineOptions\n"
        "from lifecycle.engines.base import SamplingParams\n"
        "engine = OnnxEngine.open(Path(sys.argv[1]))\n"
        "engine.generate([[5, 6]], SamplingParams(max_tokens=3)); engine.close()\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'fastapi', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(random_model.graph)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("bits", "kernels", "is_exact", "is_told"),
    [
        (8, "onnxruntime", False, True),
        (8, "onnxruntime", True, False),
        (7, "onnxruntime", False, False),
        (8, "native", False, False),
    ],
)
def test_it_is_told_where_sums_can_overflow(
    random_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bits: int,
    kernels: Any,
    is_exact: bool,
    is_told: bool,
) -> None:
    quantize_graph(random_model.graph, tmp_path, "int8-rowwise", Int8Rowwise(bits))
    assert DecoderInfo.load(tmp_path).weight_bits == bits
    monkeypatch.setattr("lifecycle.engines.ort.adds_bytes_exactly", lambda: is_exact)
    OnnxEngine.open(tmp_path, EngineOptions(1, kernels=kernels)).close()
    assert ("quantize the model with weight_bits: 7" in caplog.text) == is_told
