"""Clients with many requests do not keep those of others waiting."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from serving.settings import ServerSettings
from tests.serving.conftest import MakeService
from tests.serving.running import client, running

SETTINGS = ServerSettings(api_keys=("many", "few"))


def test_keys_take_turns(make_service: MakeService) -> None:
    service = make_service(slots=1, max_queue=8)
    backend = service.backend  # type: ignore[attr-defined]
    backend.gate.clear()
    # Answers are told apart by when they come.
    backend.step_seconds = 0.05
    ends: list[str] = []

    def ask(key: str, url: str) -> None:
        body = {"model": "scripted", "prompt": "one", "max_tokens": 4}
        with client(url, key) as http:
            http.post("/v1/completions", json=body).raise_for_status()
        ends.append(key)

    with running(service, SETTINGS) as url, ThreadPoolExecutor(8) as pool:
        asked = []
        for number, key in enumerate(["many"] * 5 + ["few"]):
            asked.append(pool.submit(ask, key, url))
            while service.worker.num_unfinished <= number:
                time.sleep(0.01)
        backend.gate.set()
        for each in asked:
            each.result()
    # The one that runs already, and then whose turn it is.
    assert "few" in ends[:3]
