"""Adapters in an engine: loading, mixing, unloading; and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lifecycle.engines.adapter_bank import AdapterBank, read_weights
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import EngineError, RequestError
from lifecycle.evaluation.random_adapter import write_random_adapter
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu
from tests.graph.models import save_model

PROMPT = [1, 5, 9, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with four slots of rank 6."""
    root = tmp_path_factory.mktemp("slots")
    save_model("llama-tied", root / "hf")
    (root / "onnx").mkdir()
    export_decoder(root / "hf", root / "onnx", Cpu(), slots=(4, 6))
    return root / "onnx"


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five different adapters."""
    root = tmp_path_factory.mktemp("adapters")
    for n in range(5):
        write_random_adapter(root / str(n), _layout(model), seed=n)
    return [root / str(n) for n in range(5)]


def _layout(model: Path) -> AdapterLayout:
    layout = AdapterLayout.load(model)
    assert layout is not None
    return layout


def _open(model: Path, folders: list[Path]) -> OnnxEngine:
    engine = OnnxEngine.open(model, EngineOptions(max_num_seqs=5, prefill_chunk=8))
    for n, folder in enumerate(folders):
        engine.load_adapter(f"a{n}", folder)
    return engine


def test_what_a_request_gets_does_not_depend_on_its_neighbours(
    model: Path, folders: list[Path], tmp_path: Path
) -> None:
    """Token by token and to the last bit of every log-probability; in int8 too."""
    quantize_graph(model, tmp_path, "int8-rowwise", Int8Rowwise(7))
    (tmp_path / "adapters.json").write_bytes((model / "adapters.json").read_bytes())
    names = [None, "a0", "a1", "a2", "a3"]
    prompts = [PROMPT * (n + 1) for n in range(5)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
    for folder in (model, tmp_path):
        engine = _open(folder, folders[:4])
        alone = {
            (n, name): _run(engine, [Request("x", prompts[n], params, name)])["x"]
            for n in range(5)
            for name in names
        }
        for shift in range(5):
            mix = [names[(n + shift) % 5] for n in range(5)]
            requests = [Request(str(n), prompts[n], params, mix[n]) for n in range(5)]
            together = _run(engine, requests)
            assert together == {str(n): alone[n, mix[n]] for n in range(5)}
        assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)


def test_prompts_are_continued_by_an_adapter(model: Path, folders: list[Path]) -> None:
    engine = OnnxEngine.open(str(model), EngineOptions(prefill_chunk=8))
    engine.load_adapter("a", str(folders[0]))
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)
    plain = engine.generate([PROMPT], params)[0]
    adapted = engine.generate([PROMPT], params, adapter="a")[0]
    alone = _run(engine, [Request("x", PROMPT, params, "a")])["x"]
    assert list(zip(adapted.token_ids, adapted.logprobs, strict=True)) == alone
    assert adapted.logprobs != plain.logprobs
    with pytest.raises(RequestError, match="no adapter 'b' is loaded"):
        engine.generate([PROMPT], params, adapter="b")


def _run(engine: OnnxEngine, requests: list[Request]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.num_running or engine.num_waiting:
        for event in engine.step():
            assert event.token_id is not None and event.logprob is not None
            found[event.request_id].append((event.token_id, event.logprob))
    return found


def test_rows_without_an_adapter_are_bit_identical_beside_those_with_one(
    model: Path, folders: list[Path]
) -> None:
    engine = _open(model, folders[:2])
    plain = OnnxEngine.open(model, EngineOptions(max_num_seqs=5, prefill_chunk=8))
    # Three tokens are packed as three rows, in both.
    wanted = plain.forward([Row(n, 0, PROMPT, 4) for n in range(3)]).reshape(3, 4, -1).copy()
    mixed = engine.forward([Row(n, 0, PROMPT, 4, adapter=n) for n in range(3)]).reshape(3, 4, -1)
    assert np.array_equal(mixed[0], wanted[0])
    assert not np.allclose(mixed[1], wanted[1])
    assert not np.allclose(mixed[2], mixed[1])


def test_adapters_that_move_in_the_bank_stay_themselves(model: Path, folders: list[Path]) -> None:
    engine = _open(model, folders[:4])
    wanted = {name: engine.logits(PROMPT, name) for name in engine.adapters}
    # Every pair, often enough that entries are exchanged.
    for _ in range(3):
        for first in range(1, 5):
            for second in range(1, 5):
                for _ in range(4):
                    rows = [Row(0, 0, PROMPT, 4, adapter=first), Row(1, 0, PROMPT, 4)]
                    rows.append(Row(2, 0, PROMPT, 4, adapter=second))
                    logits = engine.forward(rows).reshape(3, 4, -1)
                    np.testing.assert_array_equal(logits[0], wanted[f"a{first - 1}"])
                    np.testing.assert_array_equal(logits[2], wanted[f"a{second - 1}"])


def test_an_unloaded_slot_takes_another_adapter(model: Path, folders: list[Path]) -> None:
    engine = _open(model, folders[:4])
    before = {name: engine.logits(PROMPT, name) for name in engine.adapters}
    with pytest.raises(EngineError, match=r"all 4 adapter slots are taken"):
        engine.load_adapter("e", folders[4])
    engine.unload_adapter("a1")
    engine.load_adapter("e", folders[4])
    assert engine.adapters == ("a0", "a2", "a3", "e")
    for name in ("a0", "a2", "a3"):
        np.testing.assert_array_equal(engine.logits(PROMPT, name), before[name])
    other = _open(model, [folders[4]])
    np.testing.assert_array_equal(engine.logits(PROMPT, "e"), other.logits(PROMPT, "a0"))
    with pytest.raises(EngineError, match=r"no adapter 'a1' is loaded.*a0, a2, a3, e"):
        engine.logits(PROMPT, "a1")


def test_unknown_and_repeated_names_are_refused(model: Path, folders: list[Path]) -> None:
    engine = _open(model, folders[:1])
    with pytest.raises(RequestError, match=r"no adapter 'b' is loaded \(loaded: a0\)"):
        engine.submit(Request("x", PROMPT, adapter="b"))
    with pytest.raises(EngineError, match="'a0' already"):
        engine.load_adapter("a0", folders[1])


def test_models_without_slots_say_how_to_get_them(model: Path, folders: list[Path]) -> None:
    root = model.parent / "plain"
    root.mkdir()
    export_decoder(model.parent / "hf", root, Cpu())
    with pytest.raises(EngineError, match=r"no adapter slots.*\{slots: 8, rank: 16\}"):
        OnnxEngine.open(root).load_adapter("a", folders[0])
    with pytest.raises(EngineError, match="export the model with adapter slots"):
        TorchEngine.open(model.parent / "hf").load_adapter("a", folders[0])


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _change_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = dict(load_file(folder / "adapter_model.safetensors"))
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


def _wider(tensors: dict[str, Any]) -> None:
    tensors[Q_A] = np.zeros((6, 80), np.float32)


def _higher(tensors: dict[str, Any]) -> None:
    tensors[Q_A], tensors[Q_B] = np.zeros((9, 64), np.float32), np.zeros((64, 9), np.float32)


def _half(tensors: dict[str, Any]) -> None:
    del tensors[Q_B]


def _head(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((6, 64), np.float32)


def _nan(tensors: dict[str, Any]) -> None:
    tensors[Q_B] = np.full((64, 6), np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_change_config(use_dora=True), r"use_dora is True: DoRA scales.*merge it"),
        (_change_config(bias="lora_only"), r"bias is 'lora_only'"),
        (_change_config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (_change_config(peft_type="IA3"), r"peft_type is 'IA3'"),
        (_change_config(init_lora_weights="pissa_niter_4"), r"'pissa_niter_4', which changes the"),
        (_change_config(lora_alpha="x"), r"lora_alpha is 'x', expected a number"),
        (_change_config(alpha_pattern={"(": 3}), r"alpha_pattern has '\('"),
        (
            _change_tensors(_wider),
            r"layers.0.self_attn.q_proj has lora_A \[6, 80\] and lora_B \[64, 6\].*"
            r"lora_A \[r, 64\] and lora_B \[64, r\]",
        ),
        (_change_tensors(_higher), r"rank 9, the slots have 6.*adapters\.rank 9"),
        (_change_tensors(_half), r"lora_A \[6, 64\] and lora_B missing"),
        (_change_tensors(_head), r"'base_model.model.lm_head.lora_A.weight' has no place.*q_proj"),
        (_change_tensors(_nan), r"q_proj.lora_B.weight holds values that are not finite"),
        (lambda f: (f / "adapter_config.json").unlink(), r"no PEFT adapter.*adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("["), r"cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model.safetensors is mis"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            r"is a pickle",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 40),
            r"is no safetensors file",
        ),
    ],
)
def test_what_a_slot_cannot_compute_is_refused(
    change: Callable[[Path], None], said: str, model: Path, tmp_path: Path
) -> None:
    """And the slots stay free."""
    folder = tmp_path / "adapter"
    write_random_adapter(folder, _layout(model), seed=0)
    engine = OnnxEngine.open(model)
    change(folder)
    for _ in range(5):
        with pytest.raises(EngineError, match=said):
            engine.load_adapter("wrong", folder)
    write_random_adapter(tmp_path / "right", _layout(model), seed=0)
    for n in range(4):
        engine.load_adapter(str(n), tmp_path / "right")
    assert engine.adapters == ("0", "1", "2", "3")


def test_alpha_patterns_and_missing_modules_are_taken_as_peft_takes_them(
    model: Path, tmp_path: Path
) -> None:
    """Its own reading is the reference."""
    root = tmp_path / "hf"
    root.mkdir()
    for file in (model.parent / "hf").iterdir():
        (root / file.name).symlink_to(file)
    folder = root / "adapter"
    write_random_adapter(folder, _layout(model), seed=0)

    def change(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "k_proj" in n or "layers.1.mlp" in n]:
            del tensors[name]

    _change_tensors(change)(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = [m for m in config["target_modules"] if "k_proj" not in m and "layers.1.mlp" not in m]
    patterns = {"q_proj": 5.0, r"layers\.0\..*_proj": 0.5}
    _change_config(target_modules=kept, alpha_pattern=patterns)(folder)
    wanted = TorchEngine.open(root).logits(PROMPT)
    found = _open(model, [folder]).logits(PROMPT, "a0")
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_damaged_layout_is_named(model: Path, tmp_path: Path) -> None:
    for text, said in (
        ("{", "damaged"),
        ('{"format": 9}', "format 9, this version reads 1"),
        ('{"format": 1, "products": [{}]}', "damaged.*'modules'"),
    ):
        (tmp_path / "adapters.json").write_text(text)
        with pytest.raises(EngineError, match=said):
            AdapterLayout.load(tmp_path)


def _changed(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an adapter with another configuration."""
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    change(config)
    (target / "adapter_config.json").write_text(json.dumps(config))
    (target / "adapter_model.safetensors").write_bytes(
        (source / "adapter_model.safetensors").read_bytes()
    )
    return target


@pytest.mark.parametrize("pattern", ["([a-z._0-9]+)+!", "(.*)*x", ".*.*.*.*.*.*.*!", "(?:a|aa){9}"])
def test_a_pattern_that_could_be_tried_for_ever_is_refused(
    pattern: str, model: Path, folders: list[Path], tmp_path: Path
) -> None:
    folder = _changed(folders[0], tmp_path / "a", lambda c: c.update(alpha_pattern={pattern: 4}))
    with pytest.raises(EngineError, match="alpha_pattern has .*spell it with fewer repetitions"):
        read_weights(folder, _layout(model))


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["(" * 5000 + "a" + ")" * 5000], "alpha_pattern has '.{80}': "),
        (["a{4294967296}"], "alpha_pattern has 'a"),
        ([f"a{n}" for n in range(1025)], "1025 patterns; at most 1024"),
    ],
)
def test_patterns_that_take_too_much_are_refused(
    patterns: list[str], said: str, model: Path, folders: list[Path], tmp_path: Path
) -> None:
    given = dict.fromkeys(patterns, 4)
    folder = _changed(folders[0], tmp_path / "a", lambda c: c.update(alpha_pattern=given))
    with pytest.raises(EngineError, match=said):
        read_weights(folder, _layout(model))


@pytest.mark.parametrize("alpha", [10**400, 1e300, True], ids=["int", "float", "bool"])
def test_an_alpha_beyond_all_bounds_is_refused(
    alpha: float, model: Path, folders: list[Path], tmp_path: Path
) -> None:
    folder = _changed(folders[0], tmp_path / "a", lambda c: c.update(lora_alpha=alpha))
    with pytest.raises(EngineError, match="lora_alpha is|not finite"):
        read_weights(folder, _layout(model))


def test_an_adapter_of_rank_nothing_is_refused(
    model: Path, folders: list[Path], tmp_path: Path
) -> None:
    folder = _changed(folders[0], tmp_path / "a", lambda c: None)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor[:0] if "lora_A" in name else tensor[:, :0].copy()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(EngineError, match="has rank 0"):
        read_weights(folder, _layout(model))


@pytest.mark.parametrize(
    ("field", "value"), [("slots", 0), ("slots", 10**12), ("rank", -1), ("rank", 10**12)]
)
def test_a_layout_that_no_memory_holds_is_refused(
    field: str, value: int, model: Path, tmp_path: Path
) -> None:
    content = json.loads((model / "adapters.json").read_text()) | {field: value}
    (tmp_path / "adapters.json").write_text(json.dumps(content))
    with pytest.raises(EngineError, match="damaged|no memory for"):
        AdapterBank(_layout(tmp_path))


@pytest.mark.parametrize("length", [2**20 + 1, 100_000_001])
def test_a_header_that_no_adapter_has_is_not_read(
    length: int, model: Path, folders: list[Path], tmp_path: Path
) -> None:
    folder = _changed(folders[0], tmp_path / "a", lambda c: None)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(200_000_000)
    with pytest.raises(EngineError, match=f"its header has {length} bytes; at most 1048576"):
        read_weights(folder, _layout(model))


def test_a_place_beside_the_adapter_is_led_to_it(model: Path, tmp_path: Path) -> None:
    """What `finetune` makes has the adapter in a folder of its own."""
    folder = tmp_path / "adapter"
    write_random_adapter(folder, _layout(model), seed=0)
    layout = _layout(model)
    with pytest.raises(EngineError, match=r"no PEFT adapter.*adapter is one$"):
        read_weights(tmp_path, layout)
    with pytest.raises(EngineError, match=r"safetensors is a file; name the folder"):
        read_weights(folder / "adapter_model.safetensors", layout)
