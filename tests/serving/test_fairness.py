"""Clients with many requests do not keep those of others waiting."""

from __future__ import annotations

from serving.settings import ServerSettings
from tests.serving.running import MakeService, order_of_ends

SETTINGS = ServerSettings(api_keys=("many", "few"))


def test_keys_take_turns(make_service: MakeService) -> None:
    body = {"model": "scripted", "prompt": "one", "max_tokens": 4}
    asked = [(key, body) for key in ["many"] * 5 + ["few"]]
    # The one that runs already, and then whose turn it is.
    ends = order_of_ends(make_service(slots=1, max_queue=8), SETTINGS, asked)
    assert ends == [0, 5, 1, 2, 3, 4]
