"""Beams in the slots of a backend.

All beams of a prompt begin as one, which computes the prompt. Where a beam goes on in two ways, the
better one stays in its slot, and the other takes the slot of a beam that has ended and copies there what
differs: the prompt and what beams have in common stay where they are, and no slot is read that another
copy has written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from lifecycle.engines.backend import Row
from lifecycle.engines.beams import Search
from lifecycle.engines.sampling import Floats
from lifecycle.engines.slot_room import SlotRoom
from lifecycle.errors import EngineError, RequestError


def run_searches(
    searches: Sequence[Search],
    num_beams: int,
    room: SlotRoom,
    on_done: Callable[[int, int], None] | None = None,
) -> None:
    """Run searches to their ends, as many together as there is room for.

    Raises:
        RequestError: one of them would not fit into the cache; nothing has been run.
        EngineError: the runtime failed, or the output of a prompt is no finite number.
    """
    waiting = deque(_Group(*pair, num_beams, room) for pair in enumerate(searches))
    for group in waiting:
        if group.most_tokens > room.max_tokens:
            raise RequestError(
                f"prompt {group.number} with {num_beams} beams takes up to {group.most_tokens} "
                f"tokens of the cache, which holds {room.max_tokens}: lower num_beams or max_tokens, "
                "or raise kv_cache_bytes"
            )
    running: list[_Group] = []
    # The lowest slots first: a step computes all up to the highest in use.
    free = [range(n, n + num_beams) for n in range(0, room.num_slots - num_beams + 1, num_beams)]
    try:
        while waiting or running:
            held = sum(group.most_tokens for group in running)
            while waiting and free and held + waiting[0].most_tokens <= room.max_tokens:
                group = waiting.popleft()
                group.enter(free.pop(0))
                held += group.most_tokens
                running.append(group)
            _step(running, room)
            for group in [group for group in running if group.search.is_done]:
                running.remove(group)
                free = sorted([*free, group.leave()], key=lambda slots: slots.start)
                if on_done is not None:
                    on_done(len(searches) - len(waiting) - len(running), len(searches))
    finally:
        for group in running:
            group.leave()


def _step(groups: Sequence[_Group], room: SlotRoom) -> None:
    batches = [list(group.rows()) for group in groups]
    logits = room.backend.forward([row for rows in batches for row in rows])
    start = 0
    for group, rows in zip(groups, batches, strict=True):
        end = start + sum(row.num_logits for row in rows)
        if end > start:
            group.take(logits[start:end])
        start = end


class _Group:
    """The beams of one prompt, and their slots."""

    def __init__(self, number: int, search: Search, num_beams: int, room: SlotRoom) -> None:
        self.number, self.search, self._room = number, search, room
        self.most_tokens = num_beams * (len(search.prompt) + search.max_tokens)
        """Of the cache."""
        self._slots = range(0)
        self._slot_of: list[int] = []
        """The slot of each running beam."""
        self._computed: dict[int, int] = {}
        """How many tokens of its beam's text a slot holds."""
        self._is_long = room.is_long(len(search.prompt))

    def enter(self, slots: range) -> None:
        """Begin in these slots."""
        self._slots, self._slot_of = slots, [slots.start]
        self._computed = dict.fromkeys(slots, 0)

    def leave(self) -> range:
        """Forget what the slots hold; they are free then."""
        for slot in self._slots:
            self._room.forget(slot)
        return self._slots

    def rows(self) -> Iterator[Row]:
        """What the next step computes. Beams with no more than a chunk to go wait until that is so
        for all."""
        chunk, adapter = self._room.chunk, self._room.adapter
        texts = [[*self.search.prompt, *output] for output in self.search.outputs]
        left = [len(texts[0]) - self._computed[slot] for slot in self._slot_of]
        is_last = max(left) <= chunk
        for slot, text, count in zip(self._slot_of, texts, left, strict=True):
            if is_last or count > chunk:
                start = self._computed[slot]
                tokens = text[start : start + chunk]
                self._computed[slot] += len(tokens)
                num_prompt = min(max(len(self.search.prompt) - start, 0), len(tokens))
                yield Row(slot, start, tokens, int(is_last), self._is_long, adapter, num_prompt)

    def take(self, logits: Floats) -> None:
        """Choose the next tokens by the logits after all texts, and let each beam have a slot that
        holds what came before them."""
        before = dict(zip(self._slot_of, self.search.outputs, strict=True))
        try:
            parents = self.search.advance(logits)
        except EngineError as error:
            raise EngineError(f"prompt {self.number}: {error}") from None
        if self.search.is_done:
            return
        self._move([self._slot_of[parent] for parent in parents], before)
        is_long = self._room.is_long(len(self.search.prompt) + len(self.search.outputs[0]))
        if is_long != self._is_long:
            # All that is in the cache was rotated as in a short text.
            self._is_long = is_long
            self._computed = dict.fromkeys(self._slots, 0)

    def _move(self, sources: Sequence[int], before: dict[int, tuple[int, ...]]) -> None:
        """Let each beam, by the slot of its parent, have a slot that holds the same."""
        spare = [slot for slot in self._slots if slot not in sources]
        self._slot_of = []
        for source in sources:
            slot = source
            if source in self._slot_of:
                slot = spare.pop(0)
                self._copy(source, slot, before)
            self._slot_of.append(slot)

    def _copy(self, source: int, target: int, before: dict[int, tuple[int, ...]]) -> None:
        """Let a slot hold what another one does. Where the cache cannot be copied, it is computed."""
        cache, stop = self._room.cache, self._computed[source]
        if cache is None:
            self._computed[target] = 0
            return
        if target in before:
            common = len(self.search.prompt) + _common(before[source], before[target])
            cache.write_cache(target, common, cache.read_cache(source, common, stop))
        else:
            cache.copy_cache(source, target, stop)
        self._computed[target] = stop


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two outputs of one length have in common from their beginning on."""
    pairs = enumerate(zip(left, right, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(left))
