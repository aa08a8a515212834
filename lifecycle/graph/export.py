"""A Hugging Face decoder to an ONNX folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from lifecycle.engines.decoder import WEIGHTS, DecoderInfo
from lifecycle.graph.adapters import save_graphs
from lifecycle.graph.architectures import read_spec
from lifecycle.graph.builder import build_decoder
from lifecycle.graph.checkpoint import Checkpoint
from lifecycle.graph.fields import Fields
from lifecycle.graph.spec import DecoderSpec
from lifecycle.graph.targets import Target
from lifecycle.graph.tensors import TensorSource
from lifecycle.graph.weights import WeightFile
from lifecycle.json_file import read_object


def export_decoder(
    source: Path,
    out: Path,
    target: Target,
    on_write: Callable[[int, int], None] | None = None,
    slots: tuple[int, int] | None = None,
    *,
    hidden_states: bool = False,
) -> DecoderInfo:
    """Write `model.onnx`, `model.onnx.data` and `decoder.json` of the model in `source`.

    Weights are float32. Memory stays at a few blocks of `safetensors_file.BLOCK` elements, whatever
    the size of the model. `on_write(bytes, all)` follows the writing of the weights. `slots` is a
    number of LoRA adapters and their rank; there are then `adapters.onnx` and `adapters.json` too; with
    `hidden_states` there is `hidden.onnx`.

    Raises:
        UnsupportedArchitectureError: the graph builder does not know the architecture.
        CheckpointError: the folder is incomplete, damaged or asks for the unsupported.
    """
    config = read_object(source / "config.json")
    spec = read_spec(config)
    info = _describe(spec, config, source, target)
    checkpoint = Checkpoint(source)
    total = 4 * sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    report = on_write or (lambda done, total: None)
    with WeightFile(out / WEIGHTS, lambda done: report(min(done, total), total)) as weights:
        tensors = TensorSource(spec, checkpoint, weights)
        if spec.tied_embeddings:
            tensors.require_tied()
        graph, layout = build_decoder(spec, tensors, weights, target, slots, hidden_states)
    tensors.require_all_read()
    save_graphs(graph, out)
    if layout is not None:
        layout.save(out)
    info.save(out)
    return info


def _describe(
    spec: DecoderSpec, config: dict[str, Any], source: Path, target: Target
) -> DecoderInfo:
    generation = source / "generation_config.json"
    fields = Fields(config)
    ends = fields
    if generation.is_file():
        found = Fields(read_object(generation), generation.name)
        ends = fields if found.values.get("eos_token_id") is None else found
    return DecoderInfo(
        architecture=spec.architecture,
        scheme="fp32",
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_layers=len(spec.layers),
        num_kv_heads=spec.attention.num_kv_heads,
        num_heads=spec.attention.num_heads,
        head_size=spec.attention.head_size,
        max_position_embeddings=spec.max_position_embeddings,
        bos_token_id=fields.optional_integer("bos_token_id", least=0),
        eos_token_ids=ends.token_ids("eos_token_id"),
        windows=_windows(spec),
        long_context=spec.long_context,
        target=target.use,
        providers=target.providers,
        schemes=target.schemes,
        kv_dtypes=target.kv_dtypes,
    )


def _windows(spec: DecoderSpec) -> tuple[int, ...]:
    """Those of all layers, if any has one."""
    windows = tuple(layer.window or 0 for layer in spec.layers)
    return windows if any(windows) else ()
