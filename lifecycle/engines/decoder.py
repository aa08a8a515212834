"""The contract between the graph builder and the engines: `decoder.json` and tensor names.

A decoder graph runs one step over B slots that carry T new tokens in all; row b carries
`query_seqlens[b]` of them, at most S. Everything but attention works on the packed tokens.

| input | type, shape | meaning |
|---|---|---|
| `input_ids` | int64 [T] | the new tokens, row after row |
| `position_ids` | int64 [T, 1] | position of each in its row (absent with fused rotary) |
| `pad_index` | int64 [B, S] | where in T each row's tokens stand; any index where there is none |
| `unpad_index` | int64 [T, 2] | where in [B, S] each packed token stands |
| `logit_index` | int64 [L] | the packed tokens whose logits are wanted |
| `seqlens_k` | int32 [B] | tokens in the row after the step, minus 1, never below 0 |
| `query_seqlens` | int32 [B] | new tokens of the row; 0 is an idle row |
| `total_sequence_length` | int32 [1] | most tokens in a row, at most the model's positions |
| `past_key_values.{i}.key`, `.value` | float32 [B, kv_heads, C, head_size] | the cache, C per row |

Attention wants room for padding too: a row with P cached tokens needs P + S <= C, so C is the
longest row plus the widest step. Keep S at 2 or more: for S = 1 the CPU provider takes another
way through attention, no faster, whose sums differ in their last bits. With S >= 2 what a row gets
does not depend on the other rows of the step.

Outputs: `logits` float32 [L, vocab_size]; `present.{i}.key`, `.value`, which may be bound
to the memory of the past.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lifecycle.errors import EngineError

FILE = "decoder.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
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
    sliding_window: int | None = None
    target: str = "cpu"
    """The hardware that the graph was made for."""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """ONNX Runtime's execution providers of that hardware, the preferred one first."""
    schemes: tuple[str, ...] = ()
    """The quantisations that the hardware runs well."""

    def save(self, folder: Path) -> None:
        """Write `decoder.json`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> DecoderInfo:
        """Read `decoder.json`.

        Raises:
            EngineError: the file is missing, broken or from a newer version.
        """
        path = folder / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values.pop("format")
        except FileNotFoundError:
            raise EngineError(f"{folder} is no exported decoder: it has no {FILE}") from None
        except (ValueError, KeyError, AttributeError) as error:
            raise EngineError(f"{path} is damaged: {error}") from error
        if found != FORMAT:
            raise EngineError(
                f"{path} has format {found}, this version reads {FORMAT}: "
                "upgrade lifecycle-toolkit or export the model again"
            )
        known = {field.name for field in fields(cls)}
        if missing := {"architecture", "scheme", "vocab_size"} - values.keys():
            raise EngineError(f"{path} is damaged: {sorted(missing)[0]} is missing")
        values.setdefault("eos_token_ids", ())
        for name in {"eos_token_ids", "providers", "schemes"} & values.keys():
            values[name] = tuple(values[name] or ())
        return cls(**{name: value for name, value in values.items() if name in known})
