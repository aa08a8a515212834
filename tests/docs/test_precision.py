"""The example of `docs/precision.md` is one that the stage takes."""

from __future__ import annotations

from typing import get_args

import yaml

from lifecycle.stages.quantize import Quantize, SchemeName
from tests.docs.blocks import ROOT, blocks

PAGE = ROOT / "docs" / "precision.md"


def test_the_example_holds() -> None:
    (block,) = blocks(PAGE)
    for settings in yaml.safe_load(block.text)["stages"].values():
        assert settings.pop("use") == "quantize"
        assert Quantize.model_validate(settings).kv_cache == "int8"


def test_every_scheme_is_explained() -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in get_args(SchemeName) if f"| `{name}` |" not in text] == []
