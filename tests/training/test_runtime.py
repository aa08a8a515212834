from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lifecycle.errors import StageError
from lifecycle.training import runtime
from lifecycle.training.runtime import compute_dtype, isolated, pick_device

CPU = torch.device("cpu")


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in {"cpu", "cuda", "mps", "xpu", "npu"}
    with pytest.raises(StageError, match="'abacus' cannot be used here"):
        pick_device("abacus")


def test_auto_is_bfloat16_only_where_the_host_is_fast_at_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(runtime, "_CPU_INFO", info)
    assert compute_dtype("auto", CPU) == torch.float32
    info.write_text("flags : fma avx2 avx512f\n")
    assert compute_dtype("auto", CPU) == torch.float32
    info.write_text("flags : fma avx2 avx512_bf16\n")
    assert compute_dtype("auto", CPU) == torch.bfloat16
    assert compute_dtype("float32", CPU) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_threads_and_random_numbers_are_as_before() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_num_threads()
    with isolated(1):
        assert torch.get_num_threads() == 1
        torch.manual_seed(6)
        torch.rand(9)
    assert torch.get_num_threads() == before
    assert torch.equal(torch.rand(3), expected)
