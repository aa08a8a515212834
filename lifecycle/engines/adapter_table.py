"""The adapters of an engine by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from lifecycle.engines.backend import Backend
from lifecycle.engines.base import AdapterWeights
from lifecycle.engines.state import RequestState
from lifecycle.errors import EngineError


class AdapterTable:
    """Which adapter each name stands for.

    A request keeps the number of the adapter that it came for, so it ends with the weights it began with,
    whatever becomes of the name. A slot is taken as long as a name or a request has its adapter.
    """

    def __init__(self, backend: Backend, states: Callable[[], Iterable[RequestState]]) -> None:
        """`states` gives the requests that are there."""
        self._backend, self._states = backend, states
        self._numbers: dict[str, int] = {}
        """By name, those used last at the end."""
        self._leaving: set[int] = set()
        """Adapters without a name that requests may still use."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the loaded adapters, in the order in which they came."""
        return tuple(sorted(self._numbers, key=self._numbers.__getitem__))

    def number(self, name: str) -> int:
        """The number of an adapter, as in `Row.adapter`; it counts as used.

        Raises:
            EngineError: none of this name is loaded.
        """
        if name not in self._numbers:
            known = ", ".join(self.names) or "none"
            raise EngineError(f"no adapter '{name}' is loaded (loaded: {known})")
        number = self._numbers[name] = self._numbers.pop(name)
        return number

    def load(
        self, name: str, weights: AdapterWeights, *, replace: bool, evict: Collection[str]
    ) -> None:
        """As `Engine.load_adapter`."""
        if name in self._numbers and not replace:
            raise EngineError(f"there is an adapter '{name}' already: unload it first")
        self._sweep()
        if (victim := self._victim(name, evict)) is None:
            number = self._backend.load_adapter(weights)
        else:
            number = self._backend.load_adapter(weights, self._numbers[victim])
            del self._numbers[victim]
        if (old := self._numbers.pop(name, None)) is not None:
            self._leaving.add(old)
        self._numbers[name] = number

    def unload(self, name: str) -> None:
        """As `Engine.unload_adapter`."""
        number = self.number(name)
        del self._numbers[name]
        self._leaving.add(number)
        self._sweep()

    def _victim(self, name: str, evict: Collection[str]) -> str | None:
        """Whose slot a new adapter takes; None if there is a free one.

        Raises:
            EngineError: there is no slot for it.
        """
        used, count = self._used(), self._backend.adapter_slots
        if name in self._numbers and self._numbers[name] not in used:
            return name
        if len(self._numbers) + len(self._leaving) < count:
            return None
        idle = (other for other, number in self._numbers.items() if number not in used)
        victim = next((other for other in idle if other in evict), None)
        if victim is None:
            gone = f" ({len(self._leaving)} until requests have ended)" if self._leaving else ""
            raise EngineError(
                f"all {count} adapter slots are taken{gone}: unload one, or export the model with more"
            )
        return victim

    def _used(self) -> set[int]:
        return {state.adapter for state in self._states()}

    def _sweep(self) -> None:
        """Free the slots of those that nobody uses any more."""
        for number in self._leaving - self._used():
            self._leaving.remove(number)
            self._backend.unload_adapter(number)
