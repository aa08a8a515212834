"""A model that answers: engine, text layer and sampling defaults behind one door."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lifecycle.bundle.manifest import MANIFEST
from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines import decoder
from lifecycle.engines.base import Engine, EngineOptions
from lifecycle.engines.grammar.compiler import Grammar
from lifecycle.engines.requests import Request, SamplingParams
from lifecycle.errors import DataError, EngineError
from lifecycle.pipeline import registry
from serving import errors
from serving.adapters import Adapters
from serving.cards import ModelCard, adapter_card, model_card
from serving.errors import ApiError
from serving.generation import Generation
from serving.grammars import Grammars
from serving.sampling import Defaults
from serving.text import AnswerText, TokenTexts
from serving.worker import EngineWorker

QUEUE_PER_SLOT = 4
"""Requests that may wait for each that can run, unless `max_queue` says otherwise."""

LONG_TEXT = 64 * 1024
"""Characters from which a text is tokenised with no other long one beside it."""
MAX_LONG_TEXTS = 8
"""Long texts that may wait to be tokenised."""


class Service:
    """One model, and its adapters under names of their own, ready to generate. Made by
    `open_service`; lives in one event loop."""

    def __init__(
        self,
        card: ModelCard,
        engine: Engine,
        tokenizer: ChatTokenizer,
        defaults: Defaults,
        max_queue: int,
        adapters: Sequence[ModelCard] = (),
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self.token_text = TokenTexts(tokenizer)
        self.defaults = defaults
        self.max_model_len = engine.max_model_len
        self.grammars = Grammars(engine, tokenizer)
        self.worker = EngineWorker(engine, max_queue, card.name)
        self.adapters = Adapters(engine, self.worker, card, adapters)
        self._model_eos = engine.eos_token_ids
        self._one_long = asyncio.Semaphore(1)
        self._tokenising = self._long_waiting = 0

    @property
    def cards(self) -> dict[str, ModelCard]:
        """All that requests can name as their model."""
        return {self.card.name: self.card} | self.adapters.cards

    async def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt for the assistant's next message.

        Raises:
            ApiError: there is no chat template, or it refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            raise errors.bad_request(
                f"'{self.card.name}' has no chat template; use /v1/completions", param="messages"
            )
        size = sum(len(str(message.get("content", ""))) for message in messages)
        try:
            return await self._tokenise(size, lambda: self.tokenizer.encode_chat(messages))
        except DataError as error:
            raise errors.bad_request(str(error), param="messages") from error

    async def close(self) -> None:
        """End what runs, and free the engine and the grammars."""
        await self.worker.close()
        await asyncio.to_thread(self.grammars.close)

    async def prompt_tokens(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a plain prompt."""
        if isinstance(prompt, list):
            return prompt
        return await self._tokenise(len(prompt), lambda: self.tokenizer.encode(prompt))

    async def _tokenise(self, size: int, work: Callable[[], list[int]]) -> list[int]:
        """Tokenise a text of `size` characters in a thread: the event loop must not wait for it.

        As many may be on their way as there are places for their requests: 600 of 63 kB made others wait
        40 s. Long texts wait for each other, and only so many: ten of 4 MB at once took 3 GB, every core,
        and with them the answers of all other clients.
        """
        is_long = size >= LONG_TEXT
        is_full = is_long and self._long_waiting >= MAX_LONG_TEXTS
        if is_full or self._tokenising >= self.worker.capacity:
            raise errors.queue_full()
        self._tokenising += 1
        self._long_waiting += is_long
        try:
            if not is_long:
                return await asyncio.to_thread(work)
            async with self._one_long:
                return await asyncio.to_thread(work)
        finally:
            self._tokenising -= 1
            self._long_waiting -= is_long

    def room(
        self, prompt: Sequence[int], asked: int | None, default: int | None, param: str
    ) -> int:
        """How many tokens may follow a prompt: those asked for; else the default, or what is
        left of the context if that is less.

        Raises:
            ApiError: the context is exceeded.
        """
        left = self.max_model_len - len(prompt)
        least = 1 if asked is None else asked
        if least > left:
            answer = "the answer needs one at least" if asked is None else f"{asked} are asked for"
            raise errors.context_length_exceeded(
                f"the prompt has {len(prompt)} tokens and {answer}; together they exceed the context of "
                f"{self.max_model_len} tokens",
                param,
            )
        return min(left, default or left) if asked is None else asked

    async def generate(
        self,
        request_id: str,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        stops: Sequence[str] = (),
        *,
        continued: bool = False,
        adapter: str | None = None,
        salt: str = "",
        tenant: str = "",
        priority: int = 0,
        timeout: float | None = None,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Begin to answer prompts, one answer each; the result must be read or closed.

        Args:
            continued: the answers go on with the text of their prompts, and are no texts of
                their own.
            adapter: the adapter to answer with.
            grammar: what each answer must be.
            salt: prompts of other salts share nothing with these (see `Request.cache_salt`).
            tenant: whom they are for; where many wait, tenants take turns.
            priority: lower ones go first.
            timeout: seconds after which the answers end as they are.

        Raises:
            ApiError: the engine is busy, stopped, or refuses a prompt.
        """
        own_stops = self.tokenizer.eos_token_ids
        requests: list[Request] = []
        for index, (prompt, params) in enumerate(prompts):
            if not params.ignore_eos:
                params = replace(params, stop_token_ids=params.stop_token_ids | own_stops)
            constraint = None
            if grammar is not None:
                model_eos = frozenset[int]() if params.ignore_eos else self._model_eos
                constraint = grammar.constraint(params.stop_token_ids | model_eos)
            request = Request(
                f"{request_id}-{index}",
                prompt,
                params,
                adapter,
                salt,
                priority=priority,
                tenant=tenant,
                timeout=timeout,
                constraint=constraint,
            )
            requests.append(request)
        # First, for a prompt may hold what is no token until the engine has taken it.
        try:
            call = await self.worker.submit(requests)
        except ApiError:
            if adapter is not None and adapter not in self.cards:
                # It has gone since the request came.
                raise errors.model_not_found(adapter, self.cards) from None
            raise
        start = self.tokenizer.continuation if continued else lambda _: self.tokenizer.stream()
        texts = [AnswerText(start(prompt), stops) for prompt, _ in prompts]
        return Generation(call, requests, texts)


def open_service(
    path: Path,
    *,
    engine: str = "onnxruntime",
    options: EngineOptions | None = None,
    name: str | None = None,
    max_queue: int | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> Service:
    """Open a model folder, check it and run it once, so that the first request is fast.

    Args:
        path: a bundle, or a model folder that the engine can run.
        name: what the API calls the model; None takes the bundle's name or the folder's.
        max_queue: requests that may wait for a slot; None takes four for each slot.
        adapters: PEFT folders to load, by the names that requests give as their model.

    Raises:
        LifecycleError: the folder cannot be served.
    """
    card = model_card(path, name)
    if engine == "onnxruntime" and not (path / decoder.FILE).is_file():
        if (path / "config.json").is_file():
            raise EngineError(
                f"{path} is a PyTorch model: export and bundle it with a recipe, "
                "or serve it as it is with --engine pytorch"
            )
        if (path / decoder.GRAPH).is_file():
            raise EngineError(
                f"{path} has the ONNX graph of '{card.name}', which is no decoder: only language "
                "models that a recipe exported (use: export) and bundled can be served; run this "
                f"one with onnxruntime.InferenceSession('{path / decoder.GRAPH}')"
            )
        raise EngineError(f"{path} is no bundle: it has neither {MANIFEST} nor {decoder.FILE}")
    tokenizer = ChatTokenizer.load(path)
    defaults = Defaults.load(path)
    opened = registry.load(registry.ENGINES, engine, Engine).open(path, options)
    try:
        cards = [_load_adapter(opened, card, *pair) for pair in (adapters or {}).items()]
        _warm_up(opened)
    except BaseException:
        opened.close()
        raise
    waiting = QUEUE_PER_SLOT * opened.max_num_seqs if max_queue is None else max_queue
    return Service(card, opened, tokenizer, defaults, waiting, cards)


def _load_adapter(engine: Engine, base: ModelCard, name: str, folder: Path) -> ModelCard:
    if name == base.name:
        raise EngineError(f"adapter '{name}' has the name of the model; give it another")
    engine.load_adapter(name, folder)
    return adapter_card(base, name, folder)


def _warm_up(engine: Engine) -> None:
    # Long enough for the engine to tell a prompt's tokens from what a step takes anyway.
    length = min(80, engine.max_model_len - 2)
    prompts = [[0] * max(length, 1)] * engine.max_num_seqs
    engine.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
    for name in engine.adapters[:1]:
        engine.logits(prompts[0], name)
