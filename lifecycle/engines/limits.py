"""What a request may ask for; everything else is refused before it costs anything."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import numpy as np

from lifecycle.engines.backend import CacheBackend
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.native import KERNELS
from lifecycle.engines.requests import LONGEST_REPEAT, Request, SamplingParams
from lifecycle.engines.state import LONGEST_RUN
from lifecycle.engines.windows import ALL_SEEN, Windows
from lifecycle.errors import EngineError, RequestError

DEFAULT_MODEL_LEN = 2048
"""Most context that a slot gets unless it is asked for: the cache takes memory by it."""

_REAL_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 100.0),
}
_MOST_BIAS = 1e4
"""Of a token's logit; beyond it float32 would lose what the others say."""
_MOST_SEQUENCES = 64
_LONGEST = 1e9
"""Seconds."""


def usable_cores() -> int:
    """Cores that this process may use, where the system says; else all of them."""
    # macOS does not say.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def cache_limit(
    options: EngineOptions,
    max_model_len: int,
    cache: CacheBackend | None,
    windows: Windows = ALL_SEEN,
) -> int:
    """Tokens that the cache may hold for all requests together.

    Raises:
        EngineError: one context does not fit, or the backend cannot tell.
    """
    most, budget = options.max_num_seqs * max_model_len, options.kv_cache_bytes
    if budget is None:
        return most
    if cache is None:
        raise EngineError("this engine cannot bound its cache: leave kv_cache_bytes out")
    per_token = cache.bytes_per_token
    # What a step adds is there before anything behind a window goes.
    added = max(options.prefill_chunk, LONGEST_RUN)
    least = per_token * ceil(min(windows.held(max_model_len) + added, max_model_len))
    if budget < least:
        raise EngineError(
            f"kv_cache_bytes is {budget}; one context of {max_model_len} tokens takes {least}: allow more, or lower "
            "max_model_len"
        )
    return min(most, budget // per_token)


def context_length(options: EngineOptions, model_limit: int) -> int:
    """Tokens per slot, for a model that knows `model_limit` positions.

    Raises:
        EngineError: an option is out of its range.
    """
    for name in ("max_num_seqs", "prefill_chunk", "threads", "kv_cache_bytes"):
        value = getattr(options, name)
        if value is not None and (not _is_integer(value) or value < 1):
            raise EngineError(f"{name} is {value!r}; it must be an integer, 1 or more")
    for name in ("prefix_cache_bytes", "draft_tokens"):
        value = getattr(options, name)
        if not _is_integer(value) or value < 0:
            raise EngineError(f"{name} is {value!r}; it must be an integer, 0 or more")
    if options.draft_model is not None and not options.draft_tokens:
        raise EngineError(
            f"draft_model is {options.draft_model} and draft_tokens is 0, so it could not guess "
            "anything: set draft_tokens, such as to 5, or leave draft_model out"
        )
    if options.max_stall is not None and not options.max_stall > 1:
        raise EngineError(f"max_stall is {options.max_stall!r}; it must be a number above 1")
    if options.kernels not in KERNELS:
        raise EngineError(
            f"kernels is {options.kernels!r}; it must be {', '.join(KERNELS[:-1])} or {KERNELS[-1]}"
        )
    wanted = options.max_model_len
    if wanted is None:
        return min(model_limit, DEFAULT_MODEL_LEN)
    if not _is_integer(wanted):
        raise EngineError(f"max_model_len is {wanted!r}; it must be an integer")
    if not 2 <= wanted <= model_limit:
        raise EngineError(f"max_model_len is {wanted}; this model allows 2 to {model_limit} tokens")
    return wanted


def check_tokens(token_ids: Sequence[int], *, most: int, vocab_size: int) -> list[int]:
    """`token_ids` as a list of plain integers.

    Raises:
        RequestError: there are none, more than `most`, or one is no id of the vocabulary.
    """
    try:
        count = len(token_ids)
    except TypeError:
        raise RequestError(f"the prompt is no list of token ids: it is {token_ids!r}") from None
    if count == 0:
        raise RequestError("the prompt is empty; it needs at least one token")
    if count > most:
        raise RequestError(f"the prompt has {count} tokens; at most {most} fit")
    try:
        array = np.asarray(token_ids)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"the prompt is no list of token ids: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError("the prompt is no list of token ids: each must be an integer")
    _check_ids(array.tolist(), "the prompt", vocab_size)
    return array.tolist()


def check_params(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """The same parameters as plain Python numbers.

    Raises:
        RequestError: one is of the wrong type, not a number or out of its range.
    """
    numbers: dict[str, int | float] = {
        name: float(_number(name, getattr(params, name), Real, low, high))
        for name, (low, high) in _REAL_BOUNDS.items()
    }
    integers: dict[str, tuple[int, int | None]] = {
        "max_tokens": (0 if params.prompt_logprobs is not None else 1, None),
        "prompt_logprobs_from": (1, None),
        "top_k": (0, None),
        "min_tokens": (0, None),
        "dry_allowed_length": (1, LONGEST_REPEAT),
    }
    if params.seed is not None:
        integers["seed"] = (-(2**63), 2**64 - 1)
    if params.logprobs is not None:
        integers["logprobs"] = (0, vocab_size)
    if params.prompt_logprobs is not None:
        integers["prompt_logprobs"] = (0, vocab_size)
    for name, (low, high) in integers.items():
        numbers[name] = int(_number(name, getattr(params, name), Integral, low, high))
    sets = {
        name: frozenset(_ids(name, getattr(params, name), vocab_size))
        for name in ("stop_token_ids", "banned_token_ids", "dry_breakers")
    }
    bias = _bias(params.logit_bias, vocab_size)
    sequences = _sequences(params.stop_sequences, vocab_size)
    found = replace(params, **numbers, **sets, logit_bias=bias, stop_sequences=sequences)
    if found.min_tokens > found.max_tokens:
        raise RequestError(
            f"min_tokens is {found.min_tokens}, more than max_tokens, {found.max_tokens}"
        )
    return found


def check_request(request: Request, *, max_model_len: int, vocab_size: int) -> Request:
    """The same request with its prompt as a list, all numbers plain.

    Raises:
        RequestError: the prompt or a parameter cannot be served.
    """
    params = check_params(request.params, vocab_size)
    if len(params.banned_token_ids | params.stop_token_ids) >= vocab_size:
        raise RequestError("banned_token_ids and stop_token_ids leave no token that could come")
    if not isinstance(request.cache_salt, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RequestError(f"cache_salt is {request.cache_salt!r}; it must be a string")
    if not isinstance(request.tenant, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RequestError(f"tenant is {request.tenant!r}; it must be a string")
    timeout = request.timeout
    if timeout is not None:
        timeout = float(_number("timeout", timeout, Real, 0.0, _LONGEST))
    priority = int(_number("priority", request.priority, Integral, -(2**31), 2**31))
    # A prompt that is only scored may fill the context.
    most = max_model_len - (params.max_tokens > 0)
    prompt = check_tokens(request.prompt, most=most, vocab_size=vocab_size)
    return replace(request, prompt=prompt, params=params, timeout=timeout, priority=priority)


def _ids(name: str, ids: object, vocab_size: int) -> list[int]:
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes):
        raise RequestError(f"{name} is {ids!r}; it must hold token ids")
    tokens: list[int] = []
    for id in cast("Iterable[object]", ids):
        if isinstance(id, bool) or not isinstance(id, Integral):
            raise RequestError(f"{name} has {id!r}; each must be an integer")
        tokens.append(int(id))
    _check_ids(tokens, name, vocab_size)
    return tokens


def _bias(bias: object, vocab_size: int) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias is {bias!r}; it must map token ids to numbers")
    pairs = cast("Mapping[object, object]", bias)
    ids = _ids("logit_bias", pairs, vocab_size)
    numbers = (
        float(_number(f"logit_bias of {id}", value, Real, -_MOST_BIAS, _MOST_BIAS))
        for id, value in zip(ids, pairs.values(), strict=True)
    )
    return dict(zip(ids, numbers, strict=True))


def _sequences(sequences: object, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    name = "stop_sequences"
    if not isinstance(sequences, Sequence) or isinstance(sequences, str | bytes):
        raise RequestError(f"{name} is {sequences!r}; it must hold sequences of token ids")
    listed = cast("Sequence[object]", sequences)
    if len(listed) > _MOST_SEQUENCES:
        raise RequestError(f"{name} holds {len(listed)}; at most {_MOST_SEQUENCES} are taken")
    found = tuple(tuple(_ids(name, each, vocab_size)) for each in listed)
    if not all(found):
        raise RequestError(f"{name} has an empty sequence, which every output ends with")
    return found


def _check_ids(ids: Sequence[int], where: str, vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{where} has the token id {token}; this model's are 0 to {vocab_size - 1}"
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any, kind: type, low: float, high: float | None) -> Any:
    noun = "an integer" if kind is Integral else "a number"
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; it must be {noun}")
    # The comparison is written so that NaN fails it.
    if not (low <= value and (high is None or value <= high)):
        span = f"{low} or more" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} is {value}; it must be {span}")
    return value
