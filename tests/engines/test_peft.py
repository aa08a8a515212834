"""What of a PEFT folder is taken as PEFT takes it, and what is refused, by both engines."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lifecycle.engines.adapter_bank import AdapterBank, read_weights
from lifecycle.engines.adapters import AdapterLayout
from lifecycle.engines.pytorch import TorchEngine
from lifecycle.errors import EngineError
from tests.engines.adapted import CHECKPOINT, GRAPH, SLOTS, layout_of, open_form

PROMPT = [1, 5, 9, 7]


@pytest.fixture
def adapter(adapted: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be changed."""
    return copytree(adapted / "0", tmp_path / "adapter")


@pytest.fixture
def layout(adapted: Path) -> AdapterLayout:
    return layout_of(adapted / GRAPH)


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
    change: Callable[[Path], None], said: str, model: Path, adapted: Path, adapter: Path
) -> None:
    """And the slots stay free."""
    engine = open_form(model)
    change(adapter)
    for _ in range(5):
        with pytest.raises(EngineError, match=said):
            engine.load_adapter("wrong", adapter)
    for n in range(SLOTS):
        engine.load_adapter(str(n), adapted / "0")
    assert engine.adapters == ("0", "1", "2", "3")


def test_a_rank_above_that_of_the_slots_is_refused_where_they_have_one(
    adapted: Path, adapter: Path
) -> None:
    _change_tensors(_higher)(adapter)
    with pytest.raises(EngineError, match=r"rank 9, the slots have 6.*adapters\.rank 9"):
        open_form(adapted / GRAPH).load_adapter("a", adapter)
    open_form(adapted / CHECKPOINT).load_adapter("a", adapter)


def test_alpha_patterns_and_missing_modules_are_taken_as_peft_takes_them(
    model: Path, adapted: Path, tmp_path: Path
) -> None:
    """Its own reading is the reference."""
    both = copytree(adapted / CHECKPOINT, tmp_path / "both")
    folder = copytree(adapted / "0", both / "adapter")

    def change(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "k_proj" in n or "layers.1.mlp" in n]:
            del tensors[name]

    _change_tensors(change)(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = [m for m in config["target_modules"] if "k_proj" not in m and "layers.1.mlp" not in m]
    patterns = {"q_proj": 5.0, r"layers\.0\..*_proj": 0.5}
    _change_config(target_modules=kept, alpha_pattern=patterns)(folder)
    wanted = TorchEngine.open(both).logits(PROMPT)
    engine = open_form(model)
    engine.load_adapter("a", folder)
    found = engine.logits(PROMPT, "a")
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_damaged_layout_is_named(tmp_path: Path) -> None:
    for text, said in (
        ("{", "damaged"),
        ('{"format": 9}', "format 9, this version reads 1"),
        ('{"format": 1, "products": [{}]}', "damaged.*'modules'"),
    ):
        (tmp_path / "adapters.json").write_text(text)
        with pytest.raises(EngineError, match=said):
            AdapterLayout.load(tmp_path)


@pytest.mark.parametrize("pattern", ["([a-z._0-9]+)+!", "(.*)*x", ".*.*.*.*.*.*.*!", "(?:a|aa){9}"])
def test_a_pattern_that_could_be_tried_for_ever_is_refused(
    pattern: str, layout: AdapterLayout, adapter: Path
) -> None:
    _change_config(alpha_pattern={pattern: 4})(adapter)
    with pytest.raises(EngineError, match="alpha_pattern has .*spell it with fewer repetitions"):
        read_weights(adapter, layout)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["(" * 5000 + "a" + ")" * 5000], "alpha_pattern has '.{80}': "),
        (["a{4294967296}"], "alpha_pattern has 'a"),
        ([f"a{n}" for n in range(1025)], "1025 patterns; at most 1024"),
    ],
)
def test_patterns_that_take_too_much_are_refused(
    patterns: list[str], said: str, layout: AdapterLayout, adapter: Path
) -> None:
    given = dict.fromkeys(patterns, 4)
    _change_config(alpha_pattern=given)(adapter)
    with pytest.raises(EngineError, match=said):
        read_weights(adapter, layout)


@pytest.mark.parametrize("alpha", [10**400, 1e300, True], ids=["int", "float", "bool"])
def test_an_alpha_beyond_all_bounds_is_refused(
    alpha: float, layout: AdapterLayout, adapter: Path
) -> None:
    _change_config(lora_alpha=alpha)(adapter)
    with pytest.raises(EngineError, match="lora_alpha is|not finite"):
        read_weights(adapter, layout)


def test_an_adapter_of_rank_nothing_is_refused(layout: AdapterLayout, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor[:0] if "lora_A" in name else tensor[:, :0].copy()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(EngineError, match="has rank 0"):
        read_weights(adapter, layout)


@pytest.mark.parametrize(
    ("field", "value"), [("slots", 0), ("slots", 10**12), ("rank", -1), ("rank", 10**12)]
)
def test_a_layout_that_no_memory_holds_is_refused(
    field: str, value: int, adapted: Path, tmp_path: Path
) -> None:
    content = json.loads((adapted / GRAPH / "adapters.json").read_text()) | {field: value}
    (tmp_path / "adapters.json").write_text(json.dumps(content))
    with pytest.raises(EngineError, match="damaged|no memory for"):
        AdapterBank(layout_of(tmp_path))


@pytest.mark.parametrize("length", [2**20 + 1, 100_000_001])
def test_a_header_that_no_adapter_has_is_not_read(
    length: int, layout: AdapterLayout, adapter: Path
) -> None:
    with (adapter / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(200_000_000)
    with pytest.raises(EngineError, match=f"its header has {length} bytes; at most 1048576"):
        read_weights(adapter, layout)


def test_a_place_beside_the_adapter_is_led_to_it(
    layout: AdapterLayout, adapter: Path, tmp_path: Path
) -> None:
    """What `finetune` makes has the adapter in a folder of its own."""
    with pytest.raises(EngineError, match=r"no PEFT adapter.*adapter is one$"):
        read_weights(tmp_path, layout)
    with pytest.raises(EngineError, match=r"safetensors is a file; name the folder"):
        read_weights(adapter / "adapter_model.safetensors", layout)
