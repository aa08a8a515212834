"""Grammars of one tokeniser, compiled and kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from lifecycle.engines.grammar.constraint import Budget, GrammarConstraint, Guard
from lifecycle.engines.grammar.exact import ESCAPES
from lifecycle.engines.grammar.spec import GrammarSpec
from lifecycle.engines.grammar.trial import Trial
from lifecycle.errors import MissingExtraError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher

STATE_BYTES = 700
"""What a state of llguidance's lexer takes; measured: 500 to 680."""
_UNKNOWN_BYTES, _UNKNOWN_PER_CHARACTER = 1 << 20, 200
"""What a grammar may take where that cannot be measured."""


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """How much a grammar may take."""

    seconds: float = 2.0
    """To compile; twice that in all, for it is compiled in a process of its own first."""
    cache_bytes: int = 256 << 20
    """All compiled grammars that are kept, with what each can still grow by."""
    grammar_bytes: int = 64 << 20
    """One compiled grammar."""
    lexer_states: int = 10_000
    """What a grammar can grow by while answers are written; all answers to it share them."""
    step_fuel: int = 100_000
    """llguidance's bound on the work of its lexer for one token; 14,000 take about 1 ms."""
    step_items: int = 20_000
    """The same of its parser; 20,000 take about 1 ms."""
    row_items: int = 1_000
    """Ways to read an answer at one place of it."""
    burst_seconds: float = 0.2
    """Processor time that an answer may take before its tokens have earned it: the bounds above count work
    that takes a microsecond here and a hundred there, in a grammar that can be read in many ways."""
    token_seconds: float = 0.01
    """What a token earns; most take 0.1 to 2 ms."""

    @property
    def most_growth(self) -> int:
        """Bytes that a grammar can grow by."""
        return self.lexer_states * STATE_BYTES

    def for_parser(self) -> dict[str, Any]:
        """By the names of llguidance's `LLParserLimits`."""
        return {
            "max_lexer_states": self.lexer_states,
            "step_lexer_fuel": self.step_fuel,
            "step_max_items": self.step_items,
            "max_items_in_row": self.row_items,
        }


class Grammar:
    """A compiled grammar, from which each answer gets its own constraint; made by
    `GrammarCompiler.compile`."""

    def __init__(
        self, compiler: GrammarCompiler, spec: GrammarSpec, matcher: LLMatcher, num_bytes: int
    ) -> None:
        self.num_bytes = num_bytes
        """With what it can still grow by."""
        self._compiler, self._spec, self._matcher = compiler, spec, matcher

    def constraint(self, ends: frozenset[int]) -> GrammarConstraint:
        """A constraint at the beginning of an answer; microseconds.

        Args:
            ends: the tokens that end the request.
        """
        compiler = self._compiler
        return GrammarConstraint(
            self._matcher.deep_copy(),
            compiler.vocab_size,
            ends,
            compiler.ends - ends,
            lambda: compiler.forget(self._spec, self),
            Budget(compiler.limits.burst_seconds, compiler.limits.token_seconds),
            compiler.guard.copy() if self._spec.kind == "json_schema" else None,
        )


class GrammarCompiler:
    """Compiles grammars for one tokeniser, and keeps those used last. Thread-safe; not for the thread of an
    engine, for it may take seconds."""

    def __init__(
        self,
        tokenizer: str,
        vocab_size: int,
        ends: frozenset[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        """
        Args:
            tokenizer: the text of a `tokenizer.json`.
            vocab_size: tokens of the model, which may have more than the tokeniser.
            ends: tokens that end an answer; none takes the tokeniser's own.

        Raises:
            MissingExtraError: llguidance is not installed.
            RequestError: it cannot read this tokeniser.
        """
        try:
            from llguidance import LLTokenizer
        except ModuleNotFoundError as error:
            raise MissingExtraError.explain("a grammar", error) or error from None
        try:
            made = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(ends) or None)
        except ValueError as error:
            raise RequestError(
                f"this model cannot follow a grammar: its tokeniser is not supported ({error})"
            ) from None
        self.vocab_size = vocab_size
        self.ends = frozenset(made.eos_tokens)
        """Tokens that grammars end with."""
        self.limits = limits or GrammarLimits()
        self._tokenizer = made
        given = {"tokenizer": tokenizer, "vocab_size": vocab_size, "ends": sorted(self.ends)}
        self._trial = Trial(given)
        self.guard = self._guard()
        """What answers by a schema match besides."""
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Of the grammars that are kept, with what they can still grow by."""
        return self._num_bytes

    def find(self, spec: GrammarSpec) -> Grammar | None:
        """A grammar that is kept; takes no time."""
        with self._lock:
            if spec in self._kept:
                self._kept.move_to_end(spec)
            return self._kept.get(spec)

    def compile(self, spec: GrammarSpec) -> Grammar:
        """A grammar, known or new.

        Raises:
            RequestError: it is invalid, too large or too slow; nothing is kept of it.
        """
        if (known := self.find(spec)) is not None:
            return known
        text = spec.to_llguidance()
        measured = self._trial.run(text, self.limits.for_parser(), self.limits.seconds)
        size = spec.length + len(text) + self.limits.most_growth
        size += measured or _UNKNOWN_BYTES + _UNKNOWN_PER_CHARACTER * len(text)
        if size > self.limits.grammar_bytes:
            raise RequestError(
                f"the grammar takes {size >> 20} MiB, more than {self.limits.grammar_bytes >> 20}; use "
                "one with fewer alternatives, shorter bounds or less nesting"
            )
        grammar = Grammar(self, spec, self._matcher(text), size)
        self._keep(spec, grammar)
        return grammar

    def forget(self, spec: GrammarSpec, grammar: Grammar) -> None:
        """Drop a grammar that has reached its limits: all that is made of it has."""
        with self._lock:
            if self._kept.get(spec) is grammar:
                self._num_bytes -= self._kept.pop(spec).num_bytes

    def close(self) -> None:
        """Free all."""
        self._trial.close()
        with self._lock:
            self._kept.clear()
            self._num_bytes = 0

    def _matcher(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False, **self.limits.for_parser())
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        # The first mask takes longest, and must not be left to the engine's thread.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise RequestError("the grammar cannot be used: it is beyond the limits of its parser")
        return matcher

    def _guard(self) -> Guard:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_regex(ESCAPES), log_level=0)
        return Guard(matcher, np.frombuffer(matcher.compute_bitmask(), np.uint8))

    def _keep(self, spec: GrammarSpec, grammar: Grammar) -> None:
        with self._lock:
            # Another thread may have been as fast.
            if spec in self._kept:
                return
            self._kept[spec] = grammar
            self._num_bytes += grammar.num_bytes
            while self._num_bytes > self.limits.cache_bytes:
                self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes
