"""Beam search over one prompt, as `generate(num_beams=...)` of transformers 5 defines it.

A beam's score is the sum of its log-probabilities divided by its length to the power of
`length_penalty`; the end of sequence counts as a token of it. Penalties, bias and bans change the
log-probabilities, which are not normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from numbers import Real
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.base import Engine
from lifecycle.engines.limits import check_request
from lifecycle.engines.penalties import Adjustments
from lifecycle.engines.requests import FinishReason, Request, SamplingParams
from lifecycle.engines.sampling import Floats, log_softmax
from lifecycle.errors import EngineError, RequestError

_TAKEN = frozenset(
    {
        *("max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "dry_breakers"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
        *("dry_multiplier", "dry_base", "dry_allowed_length", "banned_token_ids"),
    }
)
"""What of `SamplingParams` means something without chance and for many beams at once."""
_MOST_PENALTY = 10.0
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How beams are kept and compared."""

    num_beams: int = 4
    """Texts that are continued together; each takes a slot."""
    length_penalty: float = 1.0
    """Power of the length that scores are divided by: more than 0 favours long texts, less short ones.
    Between -10 and 10."""
    early_stopping: bool | Literal["never"] = False
    """When a prompt is done that has `num_beams` finished beams: at once (True), when the best running
    one would score less than all of them if it ended now (False), or when it would at any length
    that may come ("never")."""


class Beam(NamedTuple):
    """One finished text."""

    token_ids: tuple[int, ...]
    """The new tokens, without the one that ended it."""
    score: float
    """The sum of log-probabilities by length."""
    finish_reason: FinishReason


class _Running(NamedTuple):
    token_ids: tuple[int, ...]
    logprob: float


class Search:
    """The beams of one prompt."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        beams: BeamParams,
        *,
        vocab_size: int,
        max_tokens: int,
        ends: frozenset[int],
    ) -> None:
        """`ends` are the tokens that end a beam, `max_tokens` are at most those of `params`."""
        self.prompt = list(prompt)
        self.max_tokens = max_tokens
        self.finished: list[Beam] = []
        """At most `num_beams`, the best first."""
        self.is_done = False
        self._params, self._beams, self._ends = params, beams, ends
        self._vocab_size = vocab_size
        self._is_adjusted = Adjustments.asked_for(params)
        self._running = [_Running((), 0.0)]
        # Enough to have `num_beams` that go on, whatever ends.
        self._num_candidates = max(2, 1 + len(ends)) * beams.num_beams

    @property
    def outputs(self) -> list[tuple[int, ...]]:
        """The new tokens of the running beams, all of one length, the best first."""
        return [beam.token_ids for beam in self._running]

    def advance(self, logits: Floats) -> list[int]:
        """Choose the next tokens of all beams.

        Args:
            logits: [n, vocab_size], after the text of each of the n running beams.

        Returns:
            The place among them of what each beam that runs now was before; none when it is done.

        Raises:
            EngineError: the logits are no finite numbers, or no token may come.
        """
        length = len(self._running[0].token_ids) + 1
        is_full = length >= self.max_tokens
        going_on: list[_Running] = []
        parents: list[int] = []
        for rank, (parent, token, logprob) in enumerate(self._candidates(logits)):
            tokens = self._running[parent].token_ids
            is_end = token in self._ends
            if is_end or is_full:
                if rank < self._beams.num_beams:
                    reason = FinishReason.STOP if is_end else FinishReason.LENGTH
                    tokens = tokens if is_end else (*tokens, token)
                    self.finished.append(Beam(tokens, self._score(logprob, length), reason))
            elif len(going_on) < self._beams.num_beams:
                going_on.append(_Running((*tokens, token), logprob))
                parents.append(parent)
        self.finished.sort(key=lambda beam: -beam.score)
        del self.finished[self._beams.num_beams :]
        self._running = going_on
        self.is_done = not going_on or not self._may_improve(length)
        if self.is_done and not self.finished:
            raise EngineError("no token may come")
        return [] if self.is_done else parents

    def _candidates(self, logits: Floats) -> list[tuple[int, int, float]]:
        """The likeliest continuations, the best first: beam, token, sum of log-probabilities."""
        found: list[tuple[int, int, float]] = []
        for parent, (row, beam) in enumerate(zip(logits, self._running, strict=True)):
            logprobs = self._logprobs(row, beam.token_ids)
            best = largest(logprobs, self._num_candidates)
            pairs = zip(best.tolist(), logprobs[best].tolist(), strict=True)
            found += [(parent, t, beam.logprob + logprob) for t, logprob in pairs if logprob > -inf]
        found.sort(key=lambda candidate: -candidate[2])
        return found[: self._num_candidates]

    def _logprobs(self, logits: Floats, output: Sequence[int]) -> Floats:
        if not np.isfinite(logits.max()):
            raise EngineError("the model's output is not a finite number")
        with np.errstate(over="ignore"):
            logprobs = log_softmax(logits)
        if not self._is_adjusted:
            return logprobs
        vocab_size, ends = self._vocab_size, self._ends
        return Adjustments(self._params, self.prompt, vocab_size, ends, output).apply(logprobs)

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self._beams.length_penalty

    def _may_improve(self, length: int) -> bool:
        """Whether what runs, `length` tokens long, can take the place of what is finished."""
        beams = self._beams
        if len(self.finished) < beams.num_beams:
            return True
        if beams.early_stopping is True:
            return False
        if beams.early_stopping == "never" and beams.length_penalty > 0:
            length = self.max_tokens
        return self._score(self._running[0].logprob, length) > self.finished[-1].score


def start_searches(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    beams: BeamParams,
) -> list[Search]:
    """The searches for prompts in an engine.

    Raises:
        RequestError: a prompt or parameter cannot be served.
    """
    _check_beams(beams, params, engine.max_num_seqs)
    searches: list[Search] = []
    for number, prompt in enumerate(prompts):
        request = check_request(
            Request(str(number), prompt, params),
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
        )
        ends = request.params.stop_token_ids
        if not params.ignore_eos:
            ends |= engine.eos_token_ids
        left = engine.max_model_len - len(request.prompt)
        searches.append(
            Search(
                request.prompt,
                request.params,
                beams,
                vocab_size=engine.vocab_size,
                max_tokens=min(request.params.max_tokens, left),
                ends=ends,
            )
        )
    return searches


def _check_beams(beams: BeamParams, params: SamplingParams, max_num_seqs: int) -> None:
    """Refuse what cannot be searched.

    Raises:
        RequestError: names the parameter, its value and what is taken.
    """
    count, penalty = beams.num_beams, beams.length_penalty
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RequestError(f"num_beams is {count!r}; it must be an integer, 1 or more")
    if count > max_num_seqs:
        raise RequestError(
            f"num_beams is {count}, and each beam takes a slot of {max_num_seqs}: ask for fewer, "
            "or open the engine with a larger max_num_seqs"
        )
    is_number = isinstance(penalty, Real) and not isinstance(penalty, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not (is_number and abs(penalty) <= _MOST_PENALTY):
        raise RequestError(
            f"length_penalty is {penalty!r}; it must be a number between "
            f"{-_MOST_PENALTY:g} and {_MOST_PENALTY:g}"
        )
    if not isinstance(early := beams.early_stopping, bool) and early != "never":  # pyright: ignore[reportUnnecessaryComparison]
        raise RequestError(f"early_stopping is {early!r}; it must be False, True or 'never'")
    plain = SamplingParams()
    for name in (field.name for field in fields(params)):
        if name not in _TAKEN and (value := getattr(params, name)) != getattr(plain, name):
            raise RequestError(f"{name} is {value!r}; beam search takes no {name}: leave it out")


def largest(values: Floats, count: int) -> NDArray[np.intp]:
    """The places of the `count` largest of `values` [n], the largest first, of equals the lower."""
    # So many blocks have a value that reaches the bound, so no more need be sorted than what does.
    tops = np.maximum.reduceat(values, np.arange(0, len(values), _BLOCK))
    if count >= len(tops):
        places = np.arange(len(values))
    else:
        places = np.flatnonzero(values >= np.partition(tops, -count)[-count])
    return places[np.argsort(-values[places], kind="stable")][:count]
