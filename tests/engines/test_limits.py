from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lifecycle.engines.base import EngineOptions
from lifecycle.engines.limits import check_request, context_length
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import EngineError, RequestError


def check(prompt: Any = (1, 2), **params: Any) -> Request:
    request = Request("r", prompt, SamplingParams(**params))
    return check_request(request, max_model_len=10, vocab_size=100)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 10, "10 tokens; at most 9"),
        ([1, 100], "token id 100; this model's are 0 to 99"),
        ([-1], "token id -1"),
        ([1.5], "must be an integer"),
        ([True], "must be an integer"),
        (["a"], "must be an integer"),
        ([[1], [2]], "must be an integer"),
        ([[1], [2, 3]], "no list of token ids"),
        ([None], "must be an integer"),
        ([2**80], "must be an integer"),
        (None, "no list of token ids: it is None"),
        ((i for i in [1]), "no list of token ids: it is <generator"),
        ("abc", "no list of token ids"),
        ({1, 2}, "no list of token ids"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(prompt)


@pytest.mark.parametrize("prompt", [[0, 99], (5,), np.array([1, 2]), range(9)])
def test_a_prompt_becomes_plain_integers(prompt: Any) -> None:
    tokens = check(prompt).prompt
    assert tokens == list(prompt) and all(type(token) is int for token in tokens)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", math.nan, "between 0.0 and 100.0"),
        ("temperature", -0.1, "temperature is -0.1"),
        ("temperature", math.inf, "between"),
        ("temperature", "hot", "must be a number"),
        ("temperature", True, "must be a number"),
        ("top_p", 1.01, "between 0.0 and 1.0"),
        ("top_p", math.nan, "top_p is nan"),
        ("min_p", -1, "min_p"),
        ("repetition_penalty", 0.0, "between 0.01"),
        ("top_k", -1, "0 or more"),
        ("top_k", 1.5, "must be an integer"),
        ("max_tokens", 0, "1 or more"),
        ("max_tokens", None, "must be an integer"),
        ("logprobs", 101, "between 0 and 100"),
        ("seed", 2**64, "seed"),
        ("stop_token_ids", None, "must hold token ids"),
        ("stop_token_ids", frozenset({"a"}), "'a'; each must be an integer"),
        ("stop_token_ids", frozenset({2.5}), "each must be an integer"),
        ("stop_token_ids", frozenset({100}), "stop_token_ids has the token id 100"),
        ("banned_token_ids", frozenset(range(100)), "leave no token that could come"),
        ("presence_penalty", -2.1, "between -2.0 and 2.0"),
        ("frequency_penalty", math.nan, "frequency_penalty is nan"),
        ("typical_p", 1.1, "typical_p"),
        ("dry_base", 0.5, "dry_base is 0.5"),
        ("dry_allowed_length", 0, "between 1 and 64"),
        ("dry_allowed_length", 2**63, "between 1 and 64"),
        ("min_tokens", 129, "min_tokens is 129, more than max_tokens, 128"),
        ("logit_bias", [3], "must map token ids to numbers"),
        ("logit_bias", {100: 1.0}, "logit_bias has the token id 100"),
        ("logit_bias", {3: math.inf}, "logit_bias of 3 is inf"),
        ("stop_sequences", "ab", "must hold sequences of token ids"),
        ("stop_sequences", ((3,), ()), "an empty sequence"),
        ("stop_sequences", ((100,),), "stop_sequences has the token id 100"),
    ],
)
def test_a_parameter_out_of_range_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(**{name: value})


def test_the_bounds_themselves_are_allowed() -> None:
    check(temperature=100, top_p=0, min_p=1.0, logprobs=100, max_tokens=10**9, top_k=10**9)
    check(temperature=np.float32(0.5), seed=-(2**63), repetition_penalty=0.01)


def test_numbers_of_numpy_become_plain_ones() -> None:
    names = {"seed": np.int64(-5), "top_k": np.uint32(5), "max_tokens": np.int8(3)}
    stops = frozenset({np.int64(7)})
    found = check(**names, logprobs=np.uint8(2), top_p=np.float32(0.5), stop_token_ids=stops).params
    assert found == SamplingParams(
        seed=-5, top_k=5, max_tokens=3, logprobs=2, top_p=0.5, stop_token_ids=frozenset({7})
    )
    assert {type(value) for value in (found.seed, found.top_k, *found.stop_token_ids)} == {int}
    assert type(found.top_p) is float


def test_the_context_is_the_models_own_up_to_a_default() -> None:
    assert context_length(EngineOptions(), 512) == 512
    assert context_length(EngineOptions(), 131_072) == 2048
    assert context_length(EngineOptions(max_model_len=8192), 131_072) == 8192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(max_model_len=513), "513; this model allows 2 to 512"),
        (EngineOptions(max_model_len=1), "max_model_len is 1"),
        (EngineOptions(max_num_seqs=0), "max_num_seqs is 0"),
        (EngineOptions(prefill_chunk=-1), "prefill_chunk"),
        (EngineOptions(threads=0), "threads"),
        (EngineOptions(max_num_seqs=2.0), r"max_num_seqs is 2\.0; it must be an integer"),  # type: ignore[arg-type]
        (EngineOptions(max_model_len="12"), "max_model_len is '12'"),  # type: ignore[arg-type]
        (EngineOptions(prefill_chunk=True), "prefill_chunk is True"),
    ],
)
def test_options_out_of_range_are_refused(options: EngineOptions, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        context_length(options, 512)
