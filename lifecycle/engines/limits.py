"""What a request may ask for; everything else is refused before it costs anything."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

from lifecycle.engines.base import EngineOptions, Request, SamplingParams
from lifecycle.errors import EngineError, RequestError

DEFAULT_MODEL_LEN = 2048
"""Most context that a slot gets unless it is asked for: the cache takes memory by it."""

_REAL_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def context_length(options: EngineOptions, model_limit: int) -> int:
    """Tokens per slot, for a model that knows `model_limit` positions.

    Raises:
        EngineError: an option is out of its range.
    """
    for name in ("max_num_seqs", "prefill_chunk", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise EngineError(f"{name} is {value}; it must be 1 or more")
    wanted = options.max_model_len
    if wanted is None:
        return min(model_limit, DEFAULT_MODEL_LEN)
    if not 2 <= wanted <= model_limit:
        raise EngineError(f"max_model_len is {wanted}; this model allows 2 to {model_limit} tokens")
    return wanted


def check_tokens(token_ids: Sequence[int], *, most: int, vocab_size: int) -> list[int]:
    """`token_ids` as a list of plain integers.

    Raises:
        RequestError: there are none, more than `most`, or one is no id of the vocabulary.
    """
    if len(token_ids) == 0:
        raise RequestError("the prompt is empty; it needs at least one token")
    if len(token_ids) > most:
        raise RequestError(f"the prompt has {len(token_ids)} tokens; at most {most} fit")
    try:
        array = np.asarray(token_ids)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"the prompt is no list of token ids: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError("the prompt is no list of token ids: each must be an integer")
    _check_ids(array.tolist(), "the prompt", vocab_size)
    return array.tolist()


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Check every sampling parameter.

    Raises:
        RequestError: one is of the wrong type, not a number or out of its range.
    """
    for name, (low, high) in _REAL_BOUNDS.items():
        _check_number(name, getattr(params, name), Real, low, high)
    _check_number("max_tokens", params.max_tokens, Integral, 1, None)
    _check_number("top_k", params.top_k, Integral, 0, None)
    if params.seed is not None:
        _check_number("seed", params.seed, Integral, -(2**63), 2**64 - 1)
    if params.logprobs is not None:
        _check_number("logprobs", params.logprobs, Integral, 0, vocab_size)
    _check_ids(params.stop_token_ids, "stop_token_ids", vocab_size)


def check_request(request: Request, *, max_model_len: int, vocab_size: int) -> list[int]:
    """The prompt of a request that can be served, as a list of plain integers.

    Raises:
        RequestError: the prompt or a parameter cannot be served.
    """
    check_params(request.params, vocab_size)
    return check_tokens(request.prompt, most=max_model_len - 1, vocab_size=vocab_size)


def _check_ids(ids: Sequence[int] | frozenset[int], where: str, vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{where} has the token id {token}; this model's are 0 to {vocab_size - 1}"
            )


def _check_number(name: str, value: object, kind: type, low: float, high: float | None) -> None:
    noun = "an integer" if kind is Integral else "a number"
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; it must be {noun}")
    number: float = value  # type: ignore[assignment]
    # The comparison is written so that NaN fails it.
    if not (low <= number and (high is None or number <= high)):
        span = f"{low} or more" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} is {value}; it must be {span}")
