"""The requests that wait: by priority, then fairly between tenants, then as they came."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import takewhile

from lifecycle.engines.state import RequestState

_Key = tuple[int, str]


class WaitingLine:
    """One line per priority and tenant. A tenant's turn comes by the tokens that were computed for it, as
    in the virtual token counters of Sheng et al. 2024: who comes back after a pause begins level
    with the least served of those who are here, so a pause earns nothing."""

    def __init__(self) -> None:
        self._lines: dict[_Key, OrderedDict[str, RequestState]] = {}
        self._where: dict[str, _Key] = {}
        self._served: dict[str, int] = {}
        self._present: dict[str, int] = {}
        """Requests of each tenant that wait or run."""

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._where

    def __iter__(self) -> Iterator[RequestState]:
        for line in self._lines.values():
            yield from line.values()

    def get(self, request_id: str) -> RequestState | None:
        """A request that waits, by its id."""
        key = self._where.get(request_id)
        return None if key is None else self._lines[key][request_id]

    def enter(self, state: RequestState) -> None:
        """A request has come: its tenant is here until `leave`."""
        tenant = state.request.tenant
        if tenant not in self._present:
            self._served[tenant] = min(self._served.values(), default=0)
            self._present[tenant] = 0
        self._present[tenant] += 1
        self.push(state)

    def leave(self, state: RequestState) -> None:
        """A request has ended, or is taken out."""
        self.take(state)
        tenant = state.request.tenant
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant], self._served[tenant]

    def serve(self, tenant: str, tokens: int) -> None:
        """So many tokens were computed for a tenant that is here."""
        self._served[tenant] += tokens

    def push(self, state: RequestState) -> None:
        """Put a request into its line, where it stands by when it came."""
        key = (state.request.priority, state.request.tenant)
        line = self._lines.setdefault(key, OrderedDict())
        is_newest = not line or next(reversed(line.values())).order < state.order
        line[state.request.id] = state
        self._where[state.request.id] = key
        if is_newest:
            return
        # It comes back from a slot: few that wait came before it.
        earlier = takewhile(lambda other: other.order < state.order, line.values())
        for other in reversed([*earlier, state]):
            line.move_to_end(other.request.id, last=False)

    def take(self, state: RequestState) -> None:
        """Take a request out of its line, if it is in one."""
        key = self._where.pop(state.request.id, None)
        if key is None:
            return
        line = self._lines[key]
        del line[state.request.id]
        if not line:
            del self._lines[key]

    def first(self) -> RequestState | None:
        """Whose turn it is."""
        if not self._lines:
            return None
        key = min(self._lines, key=self._turn)
        return next(iter(self._lines[key].values()))

    def _turn(self, key: _Key) -> tuple[int, int, int]:
        priority, tenant = key
        oldest = next(iter(self._lines[key].values()))
        return priority, self._served[tenant], oldest.order
