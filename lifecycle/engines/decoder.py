"""The contract between the graph builder and the engines: `decoder.json` and tensor names.

A decoder graph runs one step over B slots that carry T new tokens in all; row b carries
`query_seqlens[b]` of them, at most S. Everything but attention works on the packed tokens.

| input | type, shape | meaning |
|---|---|---|
| `input_ids` | int64 [T] | the new tokens, row after row |
| `position_ids` | int64 [T, 1] | position of each in its row (absent with fused rotary; moved in long texts, see `DecoderInfo.long_context`) |
| `pad_index` | int64 [B, S] | where in T each row's tokens stand; any index where there is none |
| `unpad_index` | int64 [T, 2] | where in [B, S] each packed token stands |
| `logit_index` | int64 [L] | the packed tokens whose logits are wanted |
| `seqlens_k` | int32 [B] | tokens in the row after the step, minus 1, never below 0 |
| `query_seqlens` | int32 [B] | new tokens of the row; 0 is an idle row |
| `total_sequence_length` | int32 [1] | most tokens in a row, at most the model's positions |
| `past_key_values.{i}.key`, `.value` | [B, kv_heads, C, width] of the cache's type | the cache, C per row |

Attention wants room for padding too: a row with P cached tokens needs P + S <= C, so C is the
longest row plus the widest step. Keep S at 2 or more: for S = 1 the CPU provider takes another
way through attention, no faster, whose sums differ in their last bits. With S >= 2 what a row gets
does not depend on the other rows of the step.

A cache holds float32, int8, or int4, two values of a head in a byte: its width is `head_size`, or half
of it. Integers have one scale per layer and channel of a head, which the graph holds. New tokens are
rounded before they are attended to, so what a text gives does not depend on how it is cut into steps.

Outputs: `logits` float32 [L, vocab_size]; `present.{i}.key`, `.value`, which may be bound
to the memory of the past.

A folder may have a second graph over the same weights, `hidden.onnx`: it has no output head, and gives
`hidden_states` float32 [L, hidden_size], normed, in place of `logits`. Another one, `prefill.onnx` with weights of
its own, computes the tokens of prompts over the same cache, where `prefill_scheme` says so.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from lifecycle.errors import EngineError

FILE = "decoder.json"
GRAPH = "model.onnx"
HIDDEN_GRAPH, HIDDEN_STATES = "hidden.onnx", "hidden_states"
WEIGHTS = "model.onnx.data"
PREFILL_GRAPH, PREFILL_WEIGHTS = "prefill.onnx", "prefill.onnx.data"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class DecoderInfo:
    """What an engine must know of a decoder graph to feed it."""

    architecture: str
    """`model_type` of the checkpoint, such as `llama`."""
    scheme: str
    """How the weights are stored: `fp32`, `int8-rowwise`, `int4`, …"""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    kv_dtype: str = "float32"
    """Type of the cache: `float32`, `int8` or `int4`."""
    windows: tuple[int, ...] = ()
    """Tokens that each layer looks back on at most, 0 for all; empty where all layers see all, and in models of older
    versions."""
    long_context: int | None = None
    """Texts of more tokens than this are rotated by the second half of the graph's tables, from
    their first token on: their `position_ids` begin at `max_position_embeddings`."""
    target: str = "cpu"
    """The hardware that the graph was made for."""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """ONNX Runtime's execution providers of that hardware, the preferred one first."""
    schemes: tuple[str, ...] = ()
    """The quantisations that the hardware runs well."""
    kv_dtypes: tuple[str, ...] = ("float32",)
    """The types of cache that the hardware runs."""
    num_heads: int | None = None
    """Heads of queries; None in models of older versions."""
    prefill_scheme: str | None = None
    """How the weights of `prefill.onnx` are stored; None if there is no such graph."""

    weight_bits: int | None = None
    """Of weights whose products ONNX Runtime adds up in 16 bits on some processors: 8 can overflow there. None where there
    are no such weights, and in models of older versions."""

    @property
    def cache_width(self) -> int:
        """Elements that the cache stores of a head and token: two values of int4 share a byte."""
        return self.head_size // 2 if self.kv_dtype == "int4" else self.head_size

    def save(self, folder: Path) -> None:
        """Write `decoder.json`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> DecoderInfo:
        """Read `decoder.json`.

        Raises:
            EngineError: there is no such folder, or the file is missing, broken or from a newer version.
        """
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise EngineError(f"{folder} {what}: name the folder of an exported decoder")
        path = folder / FILE
        try:
            values: object = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EngineError(f"{folder} is no exported decoder: it has no {FILE}") from None
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{path} is damaged: {error}") from error
        if not isinstance(values, dict) or "format" not in values:
            raise EngineError(f"{path} is damaged: it holds no object with a 'format'")
        found = cast("dict[str, object]", values)
        if found["format"] != FORMAT:
            raise EngineError(
                f"{path} has format {found['format']}, this version reads {FORMAT}: "
                "upgrade lifecycle-toolkit or export the model again"
            )
        read = {
            field.name: _read_value(path, field.name, str(field.type), found[field.name])
            for field in fields(cls)
            if field.name in found
        }
        window, count = found.get("sliding_window"), read.get("num_layers")
        if "windows" not in found and type(window) is int and type(count) is int:
            # Of all layers, as older versions have it.
            read["windows"] = (window,) * count
        required = (field.name for field in fields(cls) if field.default is MISSING)
        if missing := [name for name in required if name not in read]:
            raise EngineError(f"{path} is damaged: {missing[0]} is missing; export the model again")
        info = cls(**cast("dict[str, Any]", read))
        if info.windows and (len(info.windows) != info.num_layers or min(info.windows) < 0):
            raise EngineError(
                f"{path} is damaged: windows is {list(info.windows)}, expected one for each of {info.num_layers} layers; "
                "export the model again"
            )
        return info


def _read_value(path: Path, name: str, kind: str, value: object) -> object:
    """A value of `decoder.json`, checked to be of `kind`, a type of `DecoderInfo`."""
    is_count = type(value) is int and value >= 0
    fits = {
        "str": isinstance(value, str),
        "int": is_count,
        "int | None": is_count or value is None,
        "str | None": isinstance(value, str | None),
        "tuple[int, ...]": _is_list(value, int),
        "tuple[str, ...]": _is_list(value, str),
    }
    if not fits[kind]:
        raise EngineError(
            f"{path} is damaged: {name} is {value!r}, expected {kind}; export the model again"
        )
    return tuple(cast("list[object]", value)) if kind.startswith("tuple") else value


def _is_list(value: object, kind: type) -> bool:
    if not isinstance(value, list):
        return False
    return all(type(item) is kind for item in cast("list[object]", value))
