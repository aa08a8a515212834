"""How much of a text the layers of a model hold, of which some may look back on its last tokens only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import inf

_LEAST_STEP = 16


class Windows:
    """The windows of all layers."""

    def __init__(self, layers: Sequence[int] = ()) -> None:
        """`layers` are the tokens that each looks back on at most, 0 for all; empty where all layers see all."""
        counts = Counter(window or inf for window in layers)
        self.narrowest = min(counts, default=inf)
        """Tokens; infinite where every layer sees all."""
        self._shares = [(window, count / len(layers)) for window, count in counts.items()]
        self._is_alike = len(counts) <= 1
        self.step = max(self.narrowest / 16, _LEAST_STEP)
        """By how many tokens a text grows between two times that memory behind windows is given back: more would be
        felt in what is held, less in the time that it takes."""

    def held(self, count: float) -> float:
        """How many of `count` tokens are held, as a mean over the layers: so many times the bytes of a token."""
        if self._is_alike:
            return min(count, self.narrowest)
        return sum(share * min(count, window) for window, share in self._shares)


ALL_SEEN = Windows()
"""Those of a model whose layers see all."""
