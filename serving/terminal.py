"""A chat in the terminal, over the same service as the HTTP routes and without a socket."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count

from lifecycle.engines.requests import SamplingParams
from serving.errors import ApiError
from serving.service import Service

HELP = "/reset starts a new conversation, /exit ends it"


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How the model is to answer; None leaves it to the bundle."""

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


def talk(service: Service, options: ChatOptions) -> int:
    """Answer line by line until `/exit` or the end of the input; the exit code."""
    conversation = _Conversation(service, options)
    # The event loop runs only while an answer comes, so that Ctrl-C at the prompt ends the
    # chat at once instead of waiting for the line.
    with asyncio.Runner() as runner:
        runner.run(_start(service))
        try:
            _say_hello(service)
            while (line := _read_line()) not in (None, "/exit"):
                if line == "/reset":
                    conversation.reset()
                elif sys.stdin.isatty() and re.fullmatch("/[a-z]+", line):
                    _note(f"there is no {line}; {HELP}")
                elif line:
                    runner.run(_answer(conversation, line))
        finally:
            runner.run(service.worker.close())
    return 0


async def _start(service: Service) -> None:
    service.worker.start()


async def _answer(conversation: _Conversation, line: str) -> None:
    """Print the answer as it comes; a refused message is no reason to leave."""
    try:
        async for text in conversation.answer(line):
            print(text, end="", flush=True)  # noqa: T201
        print(flush=True)  # noqa: T201
    except ApiError as error:
        _note(f"error: {error.message}")


def _say_hello(service: Service) -> None:
    if service.tokenizer.chat_template is None:
        _note(f"{service.card.name} has no chat template: each line is continued as plain text")
    if not service.card.gated:
        _note(f"{service.card.name} is ungated: no evaluation has passed it")
    if sys.stdin.isatty():
        _note(HELP)


def _read_line() -> str | None:
    """The next line without its break; None at the end of the input."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        # Bytes that are no UTF-8 come as half surrogates, which no tokeniser takes.
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except EOFError:
        return None


def _note(text: str) -> None:
    """Standard output is for answers only."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@dataclass(slots=True)
class _Conversation:
    service: Service
    options: ChatOptions
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    turns: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    async def answer(self, text: str) -> AsyncIterator[str]:
        """The model's answer, piece by piece. It and the question are remembered together, once
        it is complete.

        Raises:
            ApiError: the conversation no longer fits into the context, or the engine failed.
        """
        service, asked = self.service, [*self.messages, {"role": "user", "content": text}]
        if service.tokenizer.chat_template is None:
            prompt = await service.prompt_tokens(text)
        else:
            prompt = await service.chat_tokens(asked)
        params = self._params(prompt)
        generation = await service.generate(f"turn-{next(self.turns)}", [(prompt, params)])
        pieces: list[str] = []
        try:
            async for deltas in generation:
                for delta in deltas:
                    pieces.append(delta.text)
                    yield delta.text
        finally:
            generation.close()
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _params(self, prompt: list[int]) -> SamplingParams:
        defaults, options = self.service.defaults, self.options
        temperature = options.temperature
        return SamplingParams(
            max_tokens=self.service.room(
                prompt, options.max_tokens, defaults.max_tokens, "messages"
            ),
            temperature=defaults.temperature if temperature is None else temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            min_p=defaults.min_p,
            typical_p=defaults.typical_p,
            repetition_penalty=defaults.repetition_penalty,
            seed=options.seed,
        )
