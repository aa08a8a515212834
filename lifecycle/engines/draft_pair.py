"""Whether one model can guess the tokens of another: both must mean the same by every id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lifecycle.errors import EngineError

TOKENIZER = "tokenizer.json"
_MEANING = ("normalizer", "pre_tokenizer", "model")
"""The parts of a tokenizer that give ids their meaning, besides added tokens; templates and padding do not."""


def check_pair(model: Path, vocab_size: int, draft: Path, draft_vocab_size: int) -> None:
    """Compare a model with its draft model, by their folders and vocabularies.

    Raises:
        EngineError: the sizes differ, or the tokenizers, where both folders have one.
    """
    way = "name a draft model that was trained with the same tokenizer"
    if vocab_size != draft_vocab_size:
        raise EngineError(
            f"draft_model {draft} has a vocabulary of {draft_vocab_size} tokens, the model "
            f"{model} one of {vocab_size}: {way}"
        )
    files = [folder / TOKENIZER for folder in (model, draft)]
    if not all(file.is_file() for file in files) or _same_bytes(*files):
        return
    left, right = map(_meaning, files)
    if different := next((name for name in left if left[name] != right[name]), None):
        raise EngineError(
            f"draft_model {draft} has another tokenizer than the model {model}: their "
            f"{TOKENIZER} differ in '{different}'; {way}"
        )


def _same_bytes(left: Path, right: Path) -> bool:
    return left.stat().st_size == right.stat().st_size and left.read_bytes() == right.read_bytes()


def _meaning(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        ids = {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
        return {name: found.get(name) for name in _MEANING} | {"added_tokens": ids}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise EngineError(f"{file} is damaged: {error!r}") from error
