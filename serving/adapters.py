"""Adapters that come and go while the server answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path, PurePath

from lifecycle.engines.base import AdapterWeights, Engine
from lifecycle.engines.peft import CONFIG, WEIGHTS
from lifecycle.errors import EngineError
from serving.cards import ModelCard, adapter_card
from serving.errors import bad_request, model_not_found
from serving.worker import EngineWorker


class Adapters:
    """The adapters of one model. Loading is done one after another; requests that run notice only the copy of
    the weights into the engine's memory."""

    def __init__(
        self, engine: Engine, worker: EngineWorker, base: ModelCard, fixed: Sequence[ModelCard]
    ) -> None:
        """`fixed` are loaded already, and stay until they are unloaded by name."""
        self._read = engine.read_adapter
        self._worker, self._base = worker, base
        self.cards = {card.name: card for card in fixed}
        """Of the loaded ones, by name."""
        self._fixed = set(self.cards)
        self._one = asyncio.Lock()

    async def load(
        self, name: str, folder: Path, *, replace: bool = False, evict: bool = False
    ) -> ModelCard:
        """Load an adapter from a PEFT folder.

        Args:
            replace: the name may be in use; requests that run end with the old adapter.
            evict: where no slot is free, one that no request uses may go.

        Raises:
            ApiError: the name is in use, no slot is free, or the engine is not ready.
            EngineError: the adapter does not fit.
        """
        if name == self._base.name:
            raise bad_request(
                f"'{name}' is the model; give the adapter another name", param="lora_name"
            )
        async with self._one:
            if name in self.cards and not replace:
                raise bad_request(
                    f"there is an adapter '{name}' already: unload it first, or load it with "
                    '"load_inplace": true',
                    param="lora_name",
                )
            weights, card = await asyncio.to_thread(self._prepare, name, folder)
            may_go = self.cards.keys() - self._fixed if evict else ()

            def take(engine: Engine) -> tuple[str, ...]:
                engine.load_adapter(name, weights, replace=replace, evict=may_go)
                return engine.adapters

            left = await self._worker.run(take)
            self.cards[name] = card
            for gone in self.cards.keys() - set(left):
                del self.cards[gone]
        return card

    async def unload(self, name: str) -> None:
        """Refuse new requests for an adapter; it leaves the engine when the last one has ended.

        Raises:
            ApiError: there is none, or the engine is not ready.
        """
        async with self._one:
            if self.cards.pop(name, None) is None:
                raise model_not_found(name, self.cards, param="lora_name")
            self._fixed.discard(name)
            await self._worker.run(lambda engine: engine.unload_adapter(name))

    def _prepare(self, name: str, folder: Path) -> tuple[AdapterWeights, ModelCard]:
        try:
            return self._read(folder), adapter_card(self._base, name, folder)
        except OSError as error:
            # What fails while it is read names no file.
            where, why = error.filename or folder, error.strerror or error
            raise EngineError(f"{where} cannot be read: {why}") from error


def folder_inside(root: Path, given: str) -> Path:
    """The adapter folder that a client names, below the one that the operator named.

    Raises:
        EngineError: it is none, or it or a file of it lies elsewhere; what is there, it does not tell.
    """
    try:
        root = root.resolve(strict=True)
        folder = (root / given).resolve(strict=True)
        files = [(folder / name).resolve() for name in (CONFIG, WEIGHTS)]
        is_inside = all(path.is_relative_to(root) for path in (folder, *files))
        if ".." not in PurePath(given).parts and is_inside and folder.is_dir():
            # No pipe, which would never end.
            if all(file.is_file() for file in files):
                return folder
            raise EngineError(f"it has to hold {CONFIG} and {WEIGHTS}")
    except (OSError, RuntimeError, ValueError):
        pass
    raise EngineError(f"there is no folder {given[:200]!r} inside the server's adapter directory")
