"""What each way to quantise costs a real model: rise of perplexity, divergence, bits per weight.

    python -m benchmarks.quality CHECKPOINT [--block-size 32] [--texts 64] [--json]

The model itself tells the texts (seeded sampling at temperature 1), so no data is needed, and half of them
calibrate, half are held out. The head is in row-wise int8 but for `mixed`, where it is measured as
every matrix is. CHECKPOINT is a Hugging Face folder of a decoder that writes text by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.base import EngineOptions, Request, SamplingParams
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.graph import hqq, mixed
from lifecycle.graph.awq import scale_channels
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.gptq import Gptq
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.pieces import LOGITS, Pieces
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu

Logs = NDArray[np.float32]
Texts = list[list[int]]
FINE = Int8Rowwise(8)
HEAD: Mapping[str, Scheme | None] = {"lm_head": FINE}


def tell(folder: Path, count: int, length: int, start: int) -> Texts:
    """Texts that the model tells from the token `start` on."""
    engine = OnnxEngine.open(folder, EngineOptions(16, length))
    for seed in range(count):
        params = SamplingParams(max_tokens=length - 1, temperature=1.0, seed=seed, ignore_eos=True)
        engine.submit(Request(str(seed), [start], params))
    found: dict[str, list[int]] = {}
    left = count
    while left:
        for event in engine.step():
            text = found.setdefault(event.request_id, [start])
            if event.token_id is not None:
                text.append(event.token_id)
            left -= event.finish_reason is not None
    return [found[str(seed)] for seed in range(count)]


def log_probabilities(folder: Path, texts: Texts) -> Logs:
    """Of every next token, [tokens, vocab]."""
    pieces = Pieces(folder, texts)
    for at in range(len(pieces.nodes)):
        session = pieces.session(at, pieces.handed_on(at), {})
        for batch in pieces.batches:
            batch.live = pieces.step(session, at, batch, batch.live)
    logits = np.concatenate([batch.live[LOGITS] for batch in pieces.batches])
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(wanted: Logs, found: Logs, texts: Texts) -> dict[str, float]:
    """The rise of perplexity in percent, and the mean divergence in nats per token."""
    following = np.concatenate([[*text[1:], -1] for text in texts])
    rows = np.flatnonzero(following >= 0)
    next_tokens = following[rows]
    rise = float(np.exp((wanted[rows, next_tokens] - found[rows, next_tokens]).mean()) - 1)
    kl = float((np.exp(wanted) * (wanted - found)).sum(axis=1).mean())
    return {"perplexity_rise_percent": round(100 * rise, 2), "kl": round(kl, 5)}


Way = Callable[[Path], tuple[Path, Scheme, Mapping[str, Scheme | None]]]
"""A scratch folder -> the graph to quantise, the scheme, the exceptions."""


def ways(source: Path, texts: Texts, size: int) -> Iterator[tuple[str, Way]]:
    """Every way to quantise, by name."""

    def awq(scratch: Path, plain: Blockwise) -> tuple[Path, Scheme, Mapping[str, Scheme | None]]:
        scale_channels(source, scratch, Calibration(source, texts), plain, HEAD)
        return scratch, plain, HEAD

    def mix(scratch: Path, bits: float) -> tuple[Path, Scheme, Mapping[str, Scheme | None]]:
        measured = mixed.measure(source, scratch, texts, Blockwise(64), FINE, {})
        names = (cost.name for cost in mixed.within_bits(measured, bits))
        scheme = Gptq(64, calibration=Calibration(source, texts))
        return source, scheme, dict.fromkeys(names, FINE)

    yield "int8-rowwise", lambda _: (source, FINE, {})
    for symmetric in (True, False):
        plain = Blockwise(size, 4, symmetric)
        kind = "" if symmetric else ", zero points"
        yield f"rtn{kind}", lambda _, plain=plain: (source, plain, HEAD)
        yield f"awq{kind}", lambda scratch, plain=plain: awq(scratch, plain)
        calibration = Calibration(source, texts)
        gptq = Gptq(size, 4, symmetric, calibration=calibration)
        yield f"gptq{kind}", lambda _, gptq=gptq: (source, gptq, HEAD)
    yield "hqq, zero points", lambda _: (source, Blockwise(size, 4, False, hqq.fit), HEAD)
    for bits in (5.2, 5.5, 6.0, 6.5):
        yield f"mixed at {bits} bits, gptq", lambda scratch, bits=bits: mix(scratch, bits)


def measure(checkpoint: Path, size: int, count: int, length: int) -> list[dict[str, Any]]:
    """One row per way."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        source = Path(root, "fp32")
        source.mkdir()
        export_decoder(checkpoint, source, Cpu())
        config = json.loads((checkpoint / "config.json").read_text())
        length = min(length, DecoderInfo.load(source).max_position_embeddings)
        texts = tell(source, count, length, config["bos_token_id"])
        held_out, texts = texts[: count // 2], texts[count // 2 :]
        wanted = log_probabilities(source, held_out)
        for i, (name, way) in enumerate(ways(source, texts, size)):
            out, scratch = Path(root, f"{i}"), Path(root, f"{i}-scratch")
            out.mkdir()
            scratch.mkdir()
            made = quantize_graph(*_arguments(way, scratch, out))
            quality = compare(wanted, log_probabilities(out, held_out), held_out)
            rows.append({"way": name, "bits_per_weight": made.bits_per_weight, **quality})
    return rows


def _arguments(
    way: Way, scratch: Path, out: Path
) -> tuple[Path, Path, str, Scheme, Mapping[str, Scheme | None]]:
    source, scheme, exceptions = way(scratch)
    return source, out, "measured", scheme, exceptions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--block-size", type=int, default=32, choices=(16, 32, 64, 128))
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--length", type=int, default=400, help="tokens of a text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows = measure(args.checkpoint, args.block_size, args.texts, args.length)
    if args.json:
        print(json.dumps({"block_size": args.block_size, "rows": rows}))
        return
    print(f"{'blocks of ' + str(args.block_size):28} bits  perplexity     KL")
    for row in rows:
        rise = row["perplexity_rise_percent"]
        print(f"{row['way']:28} {row['bits_per_weight']:4.2f} {rise:+9.2f} %  {row['kl']:.4f}")


if __name__ == "__main__":
    main()
