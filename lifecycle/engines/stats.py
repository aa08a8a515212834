"""Figures of an engine, for monitoring."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine holds now, and what it has done since it was opened."""

    num_running: int
    num_waiting: int
    cache_tokens: int
    """Tokens whose keys and values are held for requests."""
    cache_bytes: int
    """What they take, of memory that is taken at once too; 0 where the engine cannot tell."""
    cache_capacity_bytes: int
    """What they may take at most; where `kv_cache_bytes` is None, those in slots, and as much again may be put aside."""
    prefix_bytes: int
    """Held by the prefix cache."""
    prefix_hit_tokens: int
    prefix_query_tokens: int
    """Tokens of prompts that were looked for."""
    steps: int
    prompt_tokens: int
    """Computed, not found."""
    generated_tokens: int
    preemptions: int
    draft_tokens: int
    """Guessed, and computed with the token before them."""
    accepted_tokens: int
    """Of those, the ones that were right."""
    draft_cache_bytes: int
    """Taken by keys and values of the draft model."""
