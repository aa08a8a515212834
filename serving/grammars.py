"""Grammars for the requests of a service, compiled off its event loop."""

from __future__ import annotations

import asyncio
from threading import Lock

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.base import Engine
from lifecycle.engines.grammar.compiler import Grammar, GrammarCompiler
from lifecycle.engines.grammar.spec import GrammarSpec
from lifecycle.errors import MissingExtraError, RequestError
from serving import errors
from serving.structured import Asked

MAX_COMPILING = 8
"""Grammars that may wait to be compiled: one at a time is, and takes seconds at most."""


class Grammars:
    """The grammars of one model; its compiler is made for the first request that needs it."""

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = engine.vocab_size
        self._ends = engine.eos_token_ids | tokenizer.eos_token_ids
        self._compiler: GrammarCompiler | None = None
        self._lock = Lock()
        self._one = asyncio.Semaphore(1)
        self._num_compiling = 0

    async def compile(self, asked: Asked) -> Grammar:
        """The grammar that a request asks for.

        Raises:
            ApiError: it cannot be followed, or too many wait to be compiled.
        """
        try:
            compiler, spec, known = await asyncio.to_thread(self._find, asked)
            return known or await self._compile(compiler, spec)
        except (RequestError, MissingExtraError) as error:
            raise errors.bad_request(f"{asked.param}: {error}", param=asked.param) from error

    def close(self) -> None:
        """Free all."""
        with self._lock:
            if self._compiler is not None:
                self._compiler.close()

    def _find(self, asked: Asked) -> tuple[GrammarCompiler, GrammarSpec, Grammar | None]:
        with self._lock:
            if self._compiler is None:
                text = self._tokenizer.tokenizer_json
                self._compiler = GrammarCompiler(text, self._vocab_size, self._ends)
        spec = asked.make()
        return self._compiler, spec, self._compiler.find(spec)

    async def _compile(self, compiler: GrammarCompiler, spec: GrammarSpec) -> Grammar:
        """One at a time, so that hostile ones hold no thread that texts are tokenised in."""
        if self._num_compiling >= MAX_COMPILING:
            raise errors.queue_full()
        self._num_compiling += 1
        try:
            async with self._one:
                return await asyncio.to_thread(compiler.compile, spec)
        finally:
            self._num_compiling -= 1
