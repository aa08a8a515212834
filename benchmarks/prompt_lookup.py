"""What guessing from the text is worth: decoding with and without, in turns in one process.

    python -m benchmarks.prompt_lookup --tokenizer tokenizer.json [--text FILE] [--turns 5] [--json]

Random weights of the 135M shape say nothing that could be guessed, so a constraint has them say a given text:
the steps cost what they cost, and the guesses are right as often as they are for that text. `edit` is a module
of the standard library as prompt, and the same with one name changed as answer; `quote` an article and an answer
that quotes from it; `free` prose that goes on (FILE, such as a test set of WikiText).
"""

from __future__ import annotations

import json
import re
import statistics
import string
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.arguments import parser_of
from benchmarks.stall import SCHEMES, make_model
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import Request, SamplingParams

VOCAB = 49_152
Task = tuple[list[int], list[int]]


class Recital:
    """A `Constraint` that allows one token at each place; nothing is forced, so each is computed."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens, self._at = tokens, 0

    def mask(self) -> NDArray[np.bool_]:
        mask = np.zeros(VOCAB, np.bool_)
        mask[self._tokens[self._at]] = True
        return mask

    def accept(self, token: int) -> None:
        self._at += 1

    def forced(self) -> Sequence[int]:
        return ()

    @property
    def is_complete(self) -> bool:
        return self._at == len(self._tokens)


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="prose, for `free`")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, help="where the model is kept")
    args = parser.parse_args()
    works = tasks(Tokenizer.from_file(str(args.tokenizer)), args.text)
    with tempfile.TemporaryDirectory() as root:
        for scheme in args.scheme:
            folder = make_model(args.folder or Path(root), scheme)
            pair = [
                OnnxEngine.open(folder, EngineOptions(8, 2048, draft_tokens=most))
                for most in (0, args.draft_tokens)
            ]
            for name, work in works.items():
                for batch in args.batch:
                    row = compare(pair, work, batch, args.turns)
                    row = {"scheme": scheme, "task": name, "batch": batch, **row}
                    print(json.dumps(row) if args.json else describe(row), flush=True)


def describe(row: dict[str, object]) -> str:
    return "  ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )


def tasks(tokenizer: Tokenizer, text: Path | None) -> dict[str, Task]:
    """Prompt and answer of each task, in tokens below `VOCAB`."""

    def ids(part: str) -> list[int]:
        return [id % VOCAB for id in tokenizer.encode(part).ids]

    source = Path(string.__file__).read_text(encoding="utf-8")[2_500:6_000]
    made = {"edit": (ids(source)[:900], ids(re.sub(r"\bpattern\b", "expression", source))[:400])}
    if text is not None:
        prose = text.read_text(encoding="utf-8")[20_000:30_000]
        article, sentences = prose[:3_500], re.split(r"(?<= \.) ", prose[:3_500])
        said = " ".join(f'The article says : "{one}"' for one in sentences[1:12:2])
        made["quote"] = (ids(article), ids(said)[:300])
        tokens = ids(prose)
        made["free"] = (tokens[:500], tokens[500:800])
    return made


def compare(
    pair: Sequence[OnnxEngine], work: Task, batch: int, turns: int
) -> dict[str, float | str]:
    """Medians over turns of the speed with guesses by that without."""
    ratios: list[float] = []
    for turn in range(turns):
        order = pair if turn % 2 else pair[::-1]
        times = {id(engine): decode(engine, work, batch) for engine in order}
        ratios.append(times[id(pair[0])] / times[id(pair[1])])
    stats = pair[1].stats
    return {
        "speed": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "right": stats.accepted_tokens / max(stats.draft_tokens, 1),
    }


def decode(engine: OnnxEngine, work: Task, batch: int) -> float:
    """Seconds from the first tokens to the last."""
    prompt, answer = work
    for n in range(batch):
        params = SamplingParams(max_tokens=len(answer), ignore_eos=True)
        engine.submit(Request(str(n), prompt, params, constraint=Recital(answer)))
    begun: set[str] = set()
    said: list[int] = []
    while len(begun) < batch:
        begun |= {event.request_id for event in engine.step()}
    start = time.perf_counter()
    while engine.num_running:
        said += [
            e.token_id for e in engine.step() if e.request_id == "0" and e.token_id is not None
        ]
    assert said == answer[-len(said) :]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
