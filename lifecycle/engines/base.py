"""What every inference engine speaks: token ids in, token ids out.

Templates, tokenisers and stop strings live above it. One engine serves evaluation, gates,
benchmarks and HTTP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from lifecycle.engines.native import Kernels
from lifecycle.engines.providers import Provider
from lifecycle.engines.requests import Event, Generation, Request, SamplingParams, Score

if TYPE_CHECKING:
    from lifecycle.engines.beams import Beam, BeamParams
    from lifecycle.engines.embeddings import Pooling
    from lifecycle.engines.stats import EngineStats

StrPath = str | Path
AdapterWeights = Mapping[str, NDArray[np.float32 | np.uint8]]
"""What an adapter slot holds, as an engine keeps it."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much an engine may hold at once."""

    max_num_seqs: int = 8
    """Slots: requests that run together."""
    max_model_len: int | None = None
    """Context per slot, in tokens; None takes the model's own, up to 2,048."""
    threads: int | None = None
    """Threads inside an operator; None takes one per usable core."""
    prefill_chunk: int = 128
    """Prompt tokens of one request computed in one step."""
    prefix_cache_bytes: int = 0
    """Memory for keys and values of how prompts began, for prompts that begin alike; 0 is none. Engines
    that cannot copy their cache do without."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values of requests; None is room for every slot's whole context, and as much again for what
    is put aside of requests whose slots more urgent ones need. Where it is full, the requests that came last give up
    theirs and compute it anew later. What a device takes at once must fit."""
    max_stall: float | None = 3.0
    """Where requests decode, a step that computes prompts too takes at most so many times as long as one
    that does not, but for one in some hundred on a busy machine, and as far as 2 tokens of a prompt allow, or 16 where
    prompts have a graph of their own; None is no bound, nor has `generate` one."""
    draft_tokens: int = 0
    """Most tokens of a request guessed per step, from what its text holds already (prompt lookup) or by
    `draft_model`. Outputs are as likely as without; they are the same for quantised models with native kernels, with
    ONNX Runtime's for weights in float32, and for a cache in int8 with weights in row-wise int8 or blocks of 32:
    docs/decisions.md has why."""
    draft_model: StrPath | None = None
    """The folder of a smaller model with the same tokenizer, which guesses tokens where that is expected
    to save time. Its cache has the same slots, beside `kv_cache_bytes`."""
    packed_weights: Path | None = None
    """A folder that keeps weights as this machine's kernels want them, about twice the size of the model.
    They are mapped from there: an engine opens sooner, and the processes and graphs of one model have them
    in memory once. Only for graphs on the CPU, and no folder that others may write to."""
    kernels: Kernels = "auto"
    """`native` are this project's, compiled where they run; `auto` takes them where they are known to be faster and
    can be had, and ONNX Runtime's elsewhere, also for packed weights, whose form is ONNX Runtime's."""
    providers: Sequence[Provider] | None = None
    """Execution providers of ONNX Runtime to run on, the preferred one first, by name (`cuda` is enough) or with their
    options; None takes those that the graph was made for."""


class Engine(ABC):
    """Continuous batching over fixed slots. Not thread-safe: one thread owns it."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    eos_token_ids: frozenset[int]
    kernels: str | None = None
    """Whose kernels it runs, where there is a choice."""
    providers: Sequence[str] | None = None
    """The execution providers that it runs on, the preferred one first, where it runs in ONNX Runtime."""

    @classmethod
    @abstractmethod
    def open(cls, path: StrPath, options: EngineOptions | None = None) -> Self:
        """Open a model folder.

        Raises:
            EngineError: the folder is not one that this engine can run.
        """

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it can never be served (empty or too long prompt, bad parameter,
                token id out of range, id in use).
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """End a request; its slot is free from the next step on. Unknown ids are ignored."""

    @abstractmethod
    def step(self) -> list[Event]:
        """Run the model once over all that can advance. A request gets one token, or more where
        drafts were right or a constraint leaves no choice."""

    @abstractmethod
    def read_adapter(self, folder: StrPath) -> AdapterWeights:
        """Read the LoRA adapter of a PEFT folder and check that it fits. Any thread may do that while
        the one that owns the engine runs steps.

        Raises:
            EngineError: the model has no slots, or the adapter does not fit.
        """

    @abstractmethod
    def load_adapter(
        self,
        name: str,
        adapter: StrPath | AdapterWeights,
        *,
        replace: bool = False,
        evict: Collection[str] = (),
    ) -> None:
        """Make a LoRA adapter known by a name; requests can then ask for it, and one batch can mix
        adapters.

        Args:
            adapter: a PEFT folder, or what `read_adapter` made of one.
            replace: the name may be in use: it stands for the new adapter then, while the requests that
                are there end with the old one, which keeps its slot until then.
            evict: where no slot is free, the one of these that was asked for least recently, and that no
                request uses, goes.

        Raises:
            EngineError: the model has no slots or none is free, the name is in use, or the adapter
                does not fit; nothing has changed.
        """

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Forget a name. The requests that are there end with its adapter; then its slot is free.

        Raises:
            EngineError: there is none of this name.
        """

    @property
    @abstractmethod
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Requests that hold a slot."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """Figures for monitoring; cheap."""

    @abstractmethod
    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """How likely each continuation is after its context, (context, continuation), batched; contexts
        that begin alike are computed once where there is a prefix cache. Needs an idle engine.

        Raises:
            RequestError: a context or continuation is empty, or the two exceed the context length.
            EngineError: as `generate`.
        """

    @abstractmethod
    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        """The logits after each of `token_ids`, [len(token_ids), vocab_size], by a loaded adapter if
        one is named; needs an idle engine."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_done: Callable[[int, int], None] | None = None,
        adapter: str | None = None,
    ) -> list[Generation]:
        """Continue all prompts, batched, with one `params` for all or one for each, by a loaded adapter
        if one is named; `on_done(finished, total)` after each one. Needs an idle engine, and leaves one
        behind also when it raises.

        Raises:
            RequestError: a prompt can never be served, or no adapter of this name is loaded; nothing has
                been run.
            EngineError: the runtime failed, or the output of a prompt is no finite number.
        """

    @abstractmethod
    def beam_search(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        beams: BeamParams | None = None,
        adapter: str | None = None,
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[list[Beam]]:
        """The likeliest texts after each prompt, the best first, at most `num_beams` of each; as many
        prompts run together as the slots have room for. `params` holds what does not belong to
        chance: lengths, ends, penalties, bias and bans. Needs an idle engine, and leaves one behind.

        Raises:
            RequestError: as `generate`, or a parameter means nothing to a beam search, or there are
                fewer slots, or less of the cache, than the beams take.
            EngineError: as `generate`, or no adapter of this name is loaded.
        """

    @abstractmethod
    def embed(
        self,
        prompts: Sequence[Sequence[int]],
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> NDArray[np.float32]:
        """A vector for each prompt, [n, hidden_size], from the states that the output head reads: their
        mean over all tokens, those of the last token, or those of the first ("cls"), to which a decoder
        shows nothing else; of length 1 if normalised. Without any adapter loaded for requests. Needs an
        idle engine.

        Raises:
            RequestError: a prompt is empty or too long, or there is no such pooling.
            EngineError: as `generate`, or the model was exported without hidden states.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model and its caches."""
