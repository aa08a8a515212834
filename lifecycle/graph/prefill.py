"""`prefill.onnx`: a second graph of the same model, in another precision, that computes prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from lifecycle.engines.decoder import GRAPH, PREFILL_GRAPH, PREFILL_WEIGHTS, DecoderInfo
from lifecycle.engines.onnx_file import change_external_tensors
from lifecycle.errors import StageError
from lifecycle.graph.cache import SCALE_SUFFIXES

_Arrays = Mapping[str, NDArray[Any]]

_OWN = ("scheme", "schemes", "prefill_scheme", "weight_bits")
"""What two graphs over one cache may differ in."""


def check_alike(model: Path, prompts: Path) -> DecoderInfo:
    """The description of `model`, whose cache the graph in `prompts` must fill as it does itself.

    Raises:
        StageError: names the first thing in which they differ.
    """
    infos = {folder: DecoderInfo.load(folder) for folder in (model, prompts)}
    for folder, info in infos.items():
        if info.prefill_scheme is not None:
            raise StageError(
                f"{folder} has a graph for prompts already; name the model that it was made of"
            )
    ours, theirs = (asdict(info) for info in infos.values())
    for name, value in ours.items():
        if name not in _OWN and theirs[name] != value:
            raise StageError(
                f"model and prompts are not two forms of one model: {name} is {value!r} and "
                f"{theirs[name]!r}; quantise both from the same export, with the same kv_cache"
            )
    if infos[model].kv_dtype != "float32":
        _check_scales(_scales(model), _scales(prompts))
    return infos[model]


def write_prefill(prompts: Path, out: Path) -> None:
    """Write the graph of `prompts` to `out` as `prefill.onnx`, its weights in `prefill.onnx.data`."""
    graph = change_external_tensors(
        (prompts / GRAPH).read_bytes(), lambda _, entries: {**entries, "location": PREFILL_WEIGHTS}
    )
    (out / PREFILL_GRAPH).write_bytes(graph)


def _check_scales(ours: _Arrays, theirs: _Arrays) -> None:
    wrong = sorted(ours.keys() ^ theirs.keys()) or [
        name for name in ours if not np.array_equal(ours[name], theirs[name])
    ]
    if wrong:
        raise StageError(
            f"the caches of model and prompts have other scales, see '{wrong[0]}'; give both the same "
            "kv_cache and calibration, and no method that changes keys or values, such as awq"
        )


def _scales(folder: Path) -> _Arrays:
    """The scales of a cache of integers."""
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    return {
        tensor.name: numpy_helper.to_array(tensor, str(folder))
        for tensor in graph.initializer
        if tensor.name.endswith(SCALE_SUFFIXES)
    }
