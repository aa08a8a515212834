"""The examples of `docs/precision.md` are some that the stage takes."""

from __future__ import annotations

from typing import get_args

import yaml

from lifecycle.stages.quantize import Quantize, SchemeName
from tests.docs.blocks import ROOT, blocks

PAGE = ROOT / "docs" / "precision.md"


def test_the_examples_hold() -> None:
    found: list[Quantize] = []
    for block in blocks(PAGE):
        for settings in yaml.safe_load(block.text)["stages"].values():
            assert settings.pop("use") == "quantize"
            found.append(Quantize.model_validate(settings))
    assert [stage.scheme for stage in found] == ["mixed", "int8-rowwise"]
    assert found[0].distill is not None and found[1].kv_cache == "int8"


def test_every_scheme_is_explained() -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in get_args(SchemeName) if f"| `{name}` |" not in text] == []
