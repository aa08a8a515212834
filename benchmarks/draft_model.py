"""What a draft model is worth: decoding with and without, a few steps at a time in one process.

    python -m benchmarks.draft_model --draft STORIES260K [--turns 5] [--batch 1 4 8] [--tokens 300] [--json]

STORIES260K is the folder of a trained Llama in the format of Hugging Face. The model that decodes is the same grown to
the layers and widths of the 135M shape with zeros, so that steps cost what they do there (but for a small head) and
its texts are those of a trained model, rounded; the draft model is the trained one in float32. `likes` are texts at
temperature 0, `drawn` at temperature 1; for `wrong` the draft model has random weights, so no guess is worth its
time. The cache is in int8, so that all texts have to be the same with and without.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from benchmarks.arguments import parser_of
from benchmarks.models import ROWWISE
from benchmarks.prompt_lookup import describe
from benchmarks.random_llama import SMOLLM2_135M, write_llama
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.cache import calibrate_cache
from lifecycle.graph.calibration import Calibration
from lifecycle.graph.export import export_decoder
from lifecycle.graph.quantize import quantize_graph
from lifecycle.graph.targets import Cpu

SCHEMES = {"int8-rowwise": ROWWISE, "int4": Blockwise(32)}
TASKS = {"likes": 0.0, "drawn": 1.0, "wrong": 0.0}
HEAD = 64
STEPS, PAUSE = 16, 0.005
"""Of a turn of an engine, and seconds before it."""
Weights = dict[str, NDArray[np.float32]]


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--draft", type=Path, required=True, help="the folder of stories260K")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--guesses", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        drafts = make_drafts(Path(root), args.draft)
        full = exported(grow(args.draft, Path(root) / "grown"), Path(root) / "grown-fp32")
        texts = np.random.default_rng(1).integers(259, 512, (2, 128)).tolist()
        cache = calibrate_cache(Calibration(full, texts), DecoderInfo.load(full), "int8")
        for scheme in args.scheme:
            folder = Path(root) / scheme
            folder.mkdir()
            quantize_graph(full, folder, scheme, SCHEMES[scheme], cache=cache)
            for task, temperature in TASKS.items():
                draft = drafts["wrong" if task == "wrong" else "right"]
                for batch in args.batch:
                    pair = [
                        OnnxEngine.open(folder, EngineOptions(batch)),
                        OnnxEngine.open(
                            folder,
                            EngineOptions(batch, draft_tokens=args.guesses, draft_model=draft),
                        ),
                    ]
                    row = compare(pair, batch, temperature, args.tokens, args.turns)
                    row = {"scheme": scheme, "task": task, "batch": batch, **row}
                    print(json.dumps(row) if args.json else describe(row), flush=True)


def make_drafts(root: Path, checkpoint: Path) -> dict[str, Path]:
    """The trained model, and one of its shape that knows nothing."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    random = root / "random"
    write_llama(random, {name: config[name] for name in SMOLLM2_135M})
    return {
        "right": exported(checkpoint, root / "draft"),
        "wrong": exported(random, root / "wrong"),
    }


def exported(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    export_decoder(checkpoint, folder, Cpu())
    return folder


def grow(checkpoint: Path, folder: Path) -> Path:
    """A Llama of the 135M shape, but with the heads and the vocabulary of a small one, that computes what the small
    one does: whatever is new is zero."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    small, wide = config["hidden_size"], SMOLLM2_135M["hidden_size"]
    config |= {
        "hidden_size": wide,
        "intermediate_size": SMOLLM2_135M["intermediate_size"],
        "num_hidden_layers": SMOLLM2_135M["num_hidden_layers"],
        "rms_norm_eps": config["rms_norm_eps"] * small / wide,
    }
    weights: Weights = load_file(checkpoint / "model.safetensors")
    # A norm divides by the root of the mean over all channels, of which most are zero.
    weights = {
        name: value * np.float32((small / wide) ** 0.5) if value.ndim == 1 else value
        for name, value in weights.items()
    }
    grown: Weights = {
        "model.norm.weight": placed(weights["model.norm.weight"], wide),
        "model.embed_tokens.weight": placed(
            weights["model.embed_tokens.weight"], config["vocab_size"], wide
        ),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        grown |= grown_layer(
            {name: value for name, value in weights.items() if name.startswith(prefix)},
            prefix,
            config,
        )
    folder.mkdir()
    save_file(grown, folder / "model.safetensors")
    config["head_dim"] = HEAD
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def grown_layer(old: Weights, prefix: str, config: Mapping[str, Any]) -> Weights:
    """A layer of the grown model; without `old` weights it adds nothing. The pairs of channels that a rotation turns
    stand where its angles are the same."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, size = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    turned = np.arange(size // 2) * (HEAD // size)
    turned = np.concatenate([turned, turned + HEAD // 2])
    q, kv = ((np.arange(n)[:, None] * HEAD + turned).ravel() for n in (heads, kv_heads))
    scale = np.float32((HEAD / size) ** 0.5)
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    grown: Weights = {}
    for name, shape in {
        "input_layernorm": (wide,),
        "self_attn.q_proj": (heads * HEAD, wide),
        "self_attn.k_proj": (kv_heads * HEAD, wide),
        "self_attn.v_proj": (kv_heads * HEAD, wide),
        "self_attn.o_proj": (wide, heads * HEAD),
        "post_attention_layernorm": (wide,),
        "mlp.gate_proj": (inner, wide),
        "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
    }.items():
        key, last = f"{prefix}{name}.weight", name.rpartition(".")[2]
        value = old.get(key, np.zeros((0,) * len(shape), np.float32))
        if key in old and last in (*rows, "o_proj"):
            columns = q if last == "o_proj" else np.arange(value.shape[1])
            grown[key] = np.zeros(shape, np.float32)
            grown[key][np.ix_(rows.get(last, np.arange(len(value))), columns)] = value
            grown[key] *= scale if last == "q_proj" else np.float32(1)
        else:
            grown[key] = placed(value, *shape)
    return grown


def placed(value: NDArray[np.float32], *shape: int) -> NDArray[np.float32]:
    """Zeros of a shape with a value at their beginning."""
    found = np.zeros(shape, np.float32)
    found[tuple(map(slice, value.shape))] = value
    return found


def compare(
    pair: Sequence[OnnxEngine], batch: int, temperature: float, tokens: int, turns: int
) -> dict[str, float]:
    """Medians over turns of the speed with guesses by that without."""
    ratios: list[float] = []
    for turn in range(turns + 1):
        params = SamplingParams(
            max_tokens=tokens, temperature=temperature, seed=turn, ignore_eos=True
        )
        (plain, said), (guessed, same) = decode(pair, batch, params)
        if said != same:
            raise RuntimeError("a text is another one with guesses")
        # In the first turn the engine finds out what its guesses are worth.
        ratios += [plain / guessed] if turn else []
    stats = pair[1].stats
    return {
        "speed": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "right": stats.accepted_tokens / max(stats.draft_tokens, 1),
    }


def decode(
    engines: Sequence[OnnxEngine], batch: int, params: SamplingParams
) -> list[tuple[float, dict[str, list[int]]]]:
    """Seconds that each engine takes, and its texts. They take turns of a few steps, for how fast a machine is changes
    within seconds."""
    seconds, said = [0.0] * len(engines), [dict[str, list[int]]() for _ in engines]
    for engine in engines:
        for n in range(batch):
            engine.submit(Request(str(n), [1, 403, 407, 261, 378][: n % 5 + 1], params))
    order = list(range(len(engines)))
    while any(engine.num_running or engine.num_waiting for engine in engines):
        order.reverse()
        for which in order:
            engine = engines[which]
            if not (engine.num_running or engine.num_waiting):
                continue
            # Until then threads of the other one wait for work on the same cores.
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(STEPS):
                for event in engine.step():
                    if event.token_id is not None:
                        said[which].setdefault(event.request_id, []).append(event.token_id)
                if not (engine.num_running or engine.num_waiting):
                    break
            seconds[which] += time.perf_counter() - start
    return list(zip(seconds, said, strict=True))


if __name__ == "__main__":
    main()
