"""Which examples are held out: decided by content, so that adding rows moves no other row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def position(key: str, seed: int = 0) -> float:
    """Where a content stands in [0, 1), evenly spread, by the SHA-256 of seed and content."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def is_held_out(key: str, fraction: float, seed: int = 0) -> bool:
    """Whether a content belongs to the test split. What a smaller fraction holds out, a larger
    one holds out too."""
    return position(key, seed) < fraction


def held_out_keys(keys: Sequence[str], holdout: float | int, seed: int = 0) -> set[str]:
    """The keys of the test split: a fraction of them (`holdout` < 1), or those of at least
    that many rows, the same contents staying together."""
    if holdout < 1:
        return {key for key in keys if is_held_out(key, holdout, seed)}
    rows_of: dict[str, int] = {}
    for key in keys:
        rows_of[key] = rows_of.get(key, 0) + 1
    chosen: set[str] = set()
    count = 0
    for key in sorted(rows_of, key=lambda key: (position(key, seed), key)):
        if count >= holdout:
            break
        chosen.add(key)
        count += rows_of[key]
    return chosen
