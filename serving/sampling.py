"""How a bundle wants to be sampled where a request does not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lifecycle.engines.limits import check_params
from lifecycle.engines.requests import SamplingParams
from lifecycle.errors import CheckpointError, RequestError
from lifecycle.json_file import read_object

FILE = "generation_config.json"

_NUMBERS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sampling defaults; without a bundle's own they are those of the OpenAI API."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    """Of a chat answer; None leaves it what is left of the context."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `generation_config.json`, where there is one; `do_sample: false` is greedy.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        config = read_object(path)
        given = {name: config[name] for name in _NUMBERS if config.get(name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if config.get("do_sample") is False:
            given["temperature"] = 0.0
        if (most := config.get("max_new_tokens")) is not None:
            given["max_tokens"] = most
        try:
            check_params(SamplingParams(**given), vocab_size=0)
        except RequestError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        return cls(**given)
