"""Speed beside the onnxruntime-genai Generator, on a 135M-parameter Llama in int4: decoding, and a prompt.

    python -m benchmarks.engine_decode [--pairs 9] [--kernels onnxruntime] [--json]

Both run the same random weights: the peer the graph of its own builder (block 32,
accuracy_level 4, every matrix in 4 bits), this project its own export, either with every matrix
in 4 bits and blocks of 32 too or as the stage `quantize` makes it by default: larger blocks, and
the output head in row-wise int8. `--kernels onnxruntime` gives both graphs the same kernels, those of the runtime. They
take turns, one after another, in one run; the ratio is the median over the turns. Above 1, this project is faster.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from benchmarks.arguments import add_threads, parser_of
from benchmarks.batch import decoding
from benchmarks.models import ROWWISE
from benchmarks.peers import Worker, cache_dir, environment
from benchmarks.random_llama import SMOLLM2_135M, kept_llama
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.targets import Cpu
from lifecycle.stages.quantize import Quantize

PEER = ["onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"]
PROMPT, LONG_PROMPT = 128, 512


def decode(engine: Engine, batch: int, tokens: int) -> float:
    """Seconds for `tokens` steps in which `batch` requests decode."""
    with decoding(engine, batch, PROMPT):
        start = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        return time.perf_counter() - start


def our_models(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """The checkpoint as int4, exported by the code that is measured: as the peer's builder stores
    it, and as the stage makes it by default where VNNI is."""
    default = {name: field.default for name, field in Quantize.model_fields.items()}
    exceptions: dict[str, Scheme | None] = dict.fromkeys(default["int8"], ROWWISE)
    full = folder / "fp32"
    made = {name: folder / name.replace(" ", "-") for name in ("int4 alike", "int4 by default")}
    for path in (full, *made.values()):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    export_decoder(checkpoint, full, Cpu())
    quantize_graph(full, made["int4 alike"], "int4", Blockwise(32), {})
    by_default = Blockwise(default["block_size"])
    quantize_graph(full, made["int4 by default"], "int4", by_default, exceptions)
    return made


def peer_model(
    folder: Path, checkpoint: Path, python: Path, threads: int, slots: int | None = None
) -> Path:
    """The checkpoint as the peer's builder makes it, built on the first call; with `slots`, for its
    engine with so many of them, of 1,024 tokens."""
    out = folder / "genai"
    config = out / "genai_config.json"
    if not config.is_file():
        write_tokenizer(checkpoint)
        build = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
        build += ["-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")]
        build += ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
        subprocess.run(build, check=True, capture_output=True)
    settings = json.loads(config.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    whole = settings["model"]["context_length"]
    settings["search"]["max_length"] = whole if slots is None else 1024
    settings["engine"] = {"static_batching": {"max_batch_size": slots or 4}}
    config.write_text(json.dumps(settings, indent=2))
    return out


def write_tokenizer(folder: Path) -> None:
    """The least tokeniser that lets the builders of peers go on."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    Tokenizer(models.WordLevel(vocabulary, "<unk>")).save(str(folder / "tokenizer.json"))
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def prefill(engine: Engine) -> float:
    """Seconds until a long prompt has its first token."""
    prompt = np.random.default_rng(0).integers(3, 1000, LONG_PROMPT).tolist()
    start = time.perf_counter()
    engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    return time.perf_counter() - start


def compare(
    engines: dict[str, Engine], peer: Worker, batch: int | None, pairs: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of each and of the peer at one batch size, or of a prompt where it is None, and the ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    theirs: list[float] = []
    # The first turn warms all up.
    for _ in range(pairs + 1):
        for name, engine in engines.items():
            seconds[name].append(
                prefill(engine) if batch is None else decode(engine, batch, tokens)
            )
        if batch is None:
            theirs.append(peer.ask(batch=1, prompt=LONG_PROMPT, tokens=0)["first"])
        else:
            theirs.append(peer.ask(batch=batch, prompt=PROMPT, tokens=tokens)["seconds"])
    count = LONG_PROMPT if batch is None else batch * tokens
    found: dict[str, dict[str, float]] = {}
    for name, ours in seconds.items():
        ratios = [peer_s / our_s for our_s, peer_s in zip(ours[1:], theirs[1:], strict=True)]
        found[name] = {
            "ours": count / statistics.median(ours[1:]),
            "peer": count / statistics.median(theirs[1:]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kernels", choices=("auto", "onnxruntime"), default="auto")
    add_threads(parser)
    args = parser.parse_args()
    folder = cache_dir() / "llama-135m"
    checkpoint = kept_llama(folder, SMOLLM2_135M)
    python = environment("onnxruntime-genai", PEER)
    peer_folder = peer_model(folder, checkpoint, python, args.threads)
    options = EngineOptions(max(args.batch), threads=args.threads, kernels=args.kernels)
    made = our_models(folder, checkpoint)
    engines: dict[str, Engine] = {n: OnnxEngine.open(path, options) for n, path in made.items()}
    with Worker(python, "peer_genai.py", str(peer_folder)) as peer:
        work: dict[str, int | None] = {f"batch {n}": n for n in args.batch} | {"prefill": None}
        result = {n: compare(engines, peer, b, args.pairs, args.tokens) for n, b in work.items()}
    if args.json:
        print(json.dumps(result))
        return
    for what, by_model in result.items():
        for name, r in by_model.items():
            print(
                f"{what}, {name}: {r['ours']:.1f} tokens/s, onnxruntime-genai "
                f"{r['peer']:.1f}; ratio {r['ratio']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})"
            )


if __name__ == "__main__":
    main()
