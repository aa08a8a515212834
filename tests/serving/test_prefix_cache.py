"""The prefix cache over HTTP: what is reported, and who shares with whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2 as httpx

from lifecycle.engines.base import EngineOptions
from serving.service import open_service
from serving.settings import ServerSettings
from tests.serving.running import client, running
from tests.serving.test_metrics import parse

MESSAGES = [
    {"role": "system", "content": "The quick brown fox jumps over the lazy dog. " * 3},
    {"role": "user", "content": "Where does the fox jump?"},
]
COUNTED = ("queries", "hits")
SETTINGS = ServerSettings(api_keys=("first", "second"))


def ask(http: httpx.Client, **fields: Any) -> tuple[int, dict[str, Any]]:
    """How many tokens of the prompt were found, and the whole answer."""
    body = {"model": "tiny-chat", "messages": MESSAGES, "max_tokens": 5} | fields
    answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer


def test_answers_are_the_same_and_found_tokens_are_told(chat_bundle: Path) -> None:
    options = EngineOptions(2, prefill_chunk=16, prefix_cache_bytes=1 << 24)
    service = open_service(chat_bundle, options=options, name="tiny-chat")
    with running(service, SETTINGS) as url, client(url, "first") as first:
        cached, answer = ask(first, temperature=0)
        prompt_tokens = answer["usage"]["prompt_tokens"]
        assert cached == 0 and prompt_tokens > 40
        whole = (prompt_tokens - 1) // 16 * 16
        cached, again = ask(first, temperature=0)
        assert cached == whole and again["choices"] == answer["choices"]
        samples = parse(first.get("/metrics").text)
        name = frozenset({("model_name", "tiny-chat")})
        found = {what: samples[f"lifecycle_prefix_cache_{what}_total", name] for what in COUNTED}
        assert found == {"queries": 2 * prompt_tokens, "hits": whole}
        # A prompt counts once, however many answers it has.
        assert ask(first, n=3)[0] == whole
        assert ask(first, cache_salt="another user")[0] == 0
        with client(url, "second") as second:
            assert ask(second)[0] == 0
            assert ask(second)[0] == whole
