"""Execution providers, as a caller names them."""

from __future__ import annotations

import re

import pytest

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.providers import Provider, parse_provider
from lifecycle.errors import EngineError
from tests.engines.conftest import Model


def test_a_provider_is_known_without_the_ending_of_its_name(random_model: Model) -> None:
    names: list[Provider] = [
        "cpu",
        "CPUexecutionprovider",
        ("cpu", {}),
        ("cpu", {"use_arena": "0"}),
    ]
    for name in names:
        engine = OnnxEngine.open(random_model.graph, EngineOptions(1, providers=[name]))
        assert engine.providers == ["CPUExecutionProvider"]
    for wrong, message in (
        (["cpu", "nothing"], "the provider is 'nothing', which this onnxruntime .* it has .*CPU"),
        ("cpu", "providers is 'cpu'; it must be a list"),
        (
            ("cpu", {"use_arena": "0"}),
            r"it must be a list of names or of pairs .* as in \[\('cuda'",
        ),
        ([None], "it must be a list"),
        (5, "it must be a list"),
        ({"cpu": {"use_arena": "0"}}, "it must be a list"),
        (["cpu", "CPU"], "the provider 'CPU' is named twice"),
    ):
        with pytest.raises(EngineError, match=message):
            OnnxEngine.open(random_model.graph, EngineOptions(1, providers=wrong))  # pyright: ignore[reportArgumentType]
    options = EngineOptions(1, providers=[("cpu", {"use_arena": "0"})], kernels="native")
    with pytest.raises(
        EngineError, match="native kernels cannot be used: the provider has options"
    ):
        OnnxEngine.open(random_model.graph, options)


@pytest.mark.parametrize(
    ("text", "provider"),
    [
        ("cuda", "cuda"),
        ("cuda:device_id=1", ("cuda", {"device_id": "1"})),
        ("x:a=1,b=c=d:e,f=", ("x", {"a": "1", "b": "c=d:e", "f": ""})),
        ("x:shapes=a:1x2,b:1x2,c=3", ("x", {"shapes": "a:1x2,b:1x2", "c": "3"})),
    ],
)
def test_a_provider_in_one_word(text: str, provider: Provider) -> None:
    assert parse_provider(text) == provider


@pytest.mark.parametrize("text", ["", ":a=1", "x:", "x:a", "x:a=1,", "x:=1"])
def test_what_is_no_provider(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{text}': give NAME or NAME:KEY=VALUE")):
        parse_provider(text)


def test_an_option_of_a_provider_is_given_once() -> None:
    with pytest.raises(ValueError, match="'device_id' is given twice"):
        parse_provider("cuda:device_id=0,device_id=1")
