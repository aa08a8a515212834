"""Compiles grammars in a process of its own, which a hostile one may end; started by `trial`.

The first line of the input is the tokeniser, each further line a grammar; each is answered by a line. A
grammar that takes too long ends the process by SIGALRM, one that takes too much memory or stack by what
that does to a process. It imports nothing of this project, so that it starts soon.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

STACK = 2 << 20
"""Of what threads have elsewhere, a part: what fits here fits there."""
MEMORY = 1 << 30
_ONE_ARENA = -8
"""`M_ARENA_MAX` of glibc."""


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _memory_meter() -> Callable[[], int]:
    """What gives the bytes in use; always 0 where the system does not say."""
    libc = ctypes.CDLL(None)
    try:
        libc.mallopt(_ONE_ARENA, 1)
        libc.mallinfo2.restype = _MallInfo
    except AttributeError:
        return lambda: 0

    def measure() -> int:
        info = libc.mallinfo2()
        return info.uordblks + info.hblkhd

    return measure


def _compile(
    tokenizer: LLTokenizer, grammar: str, limits: dict[str, Any], measure: Callable[[], int]
) -> dict[str, object]:
    before = measure()
    bounds = LLParserLimits(verbose_errors=False, **limits)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=bounds)
    # Much of what a grammar is comes to be when it is first used.
    if not matcher.is_error():
        matcher.compute_bitmask()
        matcher.compute_ff_tokens()
    return {"error": matcher.get_error(), "num_bytes": max(measure() - before, 0)}


def _serve() -> None:
    measure = _memory_meter()
    given = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(
        given["tokenizer"], n_vocab=given["vocab_size"], eos_token=given["ends"]
    )
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        answer = _compile(tokenizer, asked["grammar"], asked["limits"], measure)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Answer until the input ends."""
    # Ctrl-C in a terminal goes to this process too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
