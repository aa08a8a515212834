"""What each way to quantise costs a real model: rise of perplexity, divergence, bits per weight.

    python -m benchmarks.quality CHECKPOINT [--text CORPUS] [--only int4/64/*] [--json]

CORPUS is a folder of the stage `corpus`: its train split calibrates, its test split is measured. Without
one the model itself tells the texts (seeded sampling at temperature 1); half of them calibrate, half
are held out, and with `--distill STEPS` some thousands more train what `mixed` with `gptq` has rounded. int4 has its head in row-wise int8; `mixed` measures the head as every matrix.
CHECKPOINT is a Hugging Face folder of a decoder that writes text by itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import parser_of
from benchmarks.ways import Ways
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.evaluation.scoring import Scorer
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.stages.quantize import Distill

Texts = list[list[int]]
Logits = NDArray[np.float32]


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
    engine.close()
    return [found[str(seed)] for seed in range(count)]


def read(checkpoint: Path, corpus: Path, split: str, count: int, length: int) -> Texts:
    """`count` windows of a split of a corpus, from documents in an order that their hashes give."""
    from lifecycle.data.chat import ChatTokenizer
    from lifecycle.evaluation.samples import windows
    from lifecycle.pipeline.artifact import digest_of

    tokenizer = ChatTokenizer.load(checkpoint)
    lines = (corpus / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    found: Texts = []
    for row in sorted((json.loads(line) for line in lines), key=digest_of):
        # Four windows of a document at most: a few long ones would be all there is.
        parts = [list(part.token_ids) for part in windows(tokenizer, row, length)[:4]]
        found += [part for part in parts if len(part) > length // 4]
        if len(found) >= count:
            break
    return found[:count]


def all_logits(folder: Path, texts: Sequence[Sequence[int]]) -> Iterator[Logits]:
    """Those of each text, [tokens, vocab], as the engine gives them."""
    engine = OnnxEngine.open(folder, EngineOptions(1, max(map(len, texts))))
    for text in texts:
        yield engine.logits(text)
    engine.close()


def compare(wanted: Sequence[Logits], folder: Path, texts: Texts) -> dict[str, float]:
    """The rise of perplexity in percent, and the mean divergence in nats per token."""
    scorer = Scorer(2)
    for reference, logits, text in zip(wanted, all_logits(folder, texts), texts, strict=True):
        scorer.add(np.array(text[1:]), [logits[:-1], reference[:-1]])
    ours, theirs = scorer.losses
    rise = 100 * (float(np.exp(ours.mean - theirs.mean)) - 1)
    found = {"perplexity_rise_percent": rise, "kl": scorer.agreement.kl}
    return {name: round(value, 5) for name, value in found.items()}


def measure(
    source: Path,
    root: Path,
    calibration: Texts,
    held_out: Texts,
    told: Texts,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """One row per way."""
    wanted = list(all_logits(source, held_out))
    distill = Distill.model_validate({"steps": args.distill or 1, "batch_size": args.batch})
    ways = Ways(source, calibration, told, distill).all(tuple(args.block_size), tuple(args.budget))
    for name, way in ways:
        if not any(fnmatchcase(name, pattern) for pattern in args.only):
            continue
        with TemporaryDirectory(dir=root) as folder:
            scratch, out = Path(folder, "scratch"), Path(folder, "out")
            scratch.mkdir()
            out.mkdir()
            made = way(scratch, out)
            quality = compare(wanted, out, held_out)
        yield {"way": name, "bits_per_weight": made.bits_per_weight, **quality}


def perplexity(logits: Iterator[Logits], texts: Texts) -> float:
    """Of every token but the first of each text."""
    scorer = Scorer(1)
    for part, text in zip(logits, texts, strict=True):
        scorer.add(np.array(text[1:]), [part[:-1]])
    return scorer.losses[0].perplexity


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--text", type=Path, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--block-size", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--budget", type=float, nargs="+", default=[4.8, 5.0, 5.2, 5.5])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of ways")
    parser.add_argument("--texts", type=int, default=32, help="held out; as many calibrate")
    parser.add_argument("--calibration", type=int, help="texts that calibrate, if others")
    parser.add_argument("--distill", type=int, help="steps of training what was rounded")
    parser.add_argument("--told", type=int, default=4096, help="texts that are trained on")
    parser.add_argument("--batch", type=int, default=5, help="of them in a step")
    parser.add_argument("--length", type=int, default=400, help="tokens of a text")
    args = parser.parse_args()
    with TemporaryDirectory() as root:
        source = Path(root, "fp32")
        source.mkdir()
        export_decoder(args.checkpoint, source, Cpu())
        info = DecoderInfo.load(source)
        count, other = args.texts, args.calibration or args.texts
        length = min(args.length, info.max_position_embeddings)
        if args.text is None:
            config = json.loads((args.checkpoint / "config.json").read_text())
            more = args.told if args.distill else 0
            texts = tell(source, count + other + more, length, config["bos_token_id"])
            held_out, calibration = texts[:count], texts[count : count + other]
            told = texts[count + other :]
        else:
            held_out = read(args.checkpoint, args.text, "test", count, length)
            calibration = read(args.checkpoint, args.text, "train", other, length)
            more = args.told if args.distill else 0
            told = read(args.checkpoint, args.text, "train", more, length) if more else []
        if not args.json:
            found = perplexity(all_logits(source, held_out), held_out)
            tokens = sum(map(len, held_out))
            print(f"perplexity in float32 {found:.2f} over {tokens} tokens held out")
            print(f"{'':28} bits  perplexity      KL")
        for row in measure(source, Path(root), calibration, held_out, told, args):
            rise = row["perplexity_rise_percent"]
            line = f"{row['way']:28} {row['bits_per_weight']:5.2f} {rise:+9.2f} % {row['kl']:8.5f}"
            print(json.dumps(row) if args.json else line, flush=True)


if __name__ == "__main__":
    main()
