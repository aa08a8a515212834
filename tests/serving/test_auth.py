"""No route answers without a key but those that say how the server is."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2 as httpx
import pytest
from starlette.requests import Request

from serving.app import create_app
from serving.auth import PUBLIC, ApiKeys
from serving.routes.generate import salt_of
from serving.schemas import GenerationBody
from serving.settings import ServerSettings
from tests.serving.running import MakeService, client, running
from tests.serving.test_errors import error_of

KEYS = ("first-key", "zweiter-Schlüssel", "voilà")
ORIGIN = "https://app.example"


@pytest.fixture
def http(make_service: MakeService) -> Iterator[httpx.Client]:
    settings = ServerSettings(api_keys=KEYS, allowed_origins=(ORIGIN,))
    with running(make_service(), settings) as url, client(url) as made:
        yield made


def test_every_route_but_the_probes_needs_a_key(
    make_service: MakeService, http: httpx.Client
) -> None:
    schema = create_app(make_service()).openapi()
    asked = {(path, method) for path, item in schema["paths"].items() for method in item}
    asked |= {("/openapi.json", "get"), ("/no/such/route", "get"), ("/docs", "get")}
    assert {path for path, _ in asked} > PUBLIC
    for path, method in asked:
        response = http.request(method, path.replace("{name}", "scripted"), json={})
        if path in PUBLIC:
            assert response.status_code == 200
        else:
            error = error_of(response, 401)
            assert error["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    [
        "Bearer FIRST-KEY",
        "Bearer first-ke",
        "Bearer first-key-and-more",
        "Bearer",
        "first-key",
        "Basic first-key",
        "",
    ],
)
def test_wrong_keys(http: httpx.Client, header: str) -> None:
    error_of(http.get("/v1/models", headers={"Authorization": header}), 401)


@pytest.mark.parametrize("key", KEYS)
def test_right_keys(http: httpx.Client, key: str) -> None:
    for scheme in ("Bearer", "bearer"):
        header = f"{scheme} {key}".encode()
        response = http.get("/v1/models", headers={"Authorization": header})
        assert response.status_code == 200


def test_the_body_of_a_stranger_is_not_read(http: httpx.Client) -> None:
    error_of(http.post("/v1/chat/completions", content=b"{" * 100), 401)


def test_clients_of_different_keys_share_no_cached_prompts() -> None:
    keys = ApiKeys(KEYS)
    tenants = [keys.tenant(f"Bearer {key}".encode().decode("latin-1")) for key in KEYS]
    assert len({*tenants, None}) == 4 and "first-key" not in tenants
    body = GenerationBody(model="m", cache_salt="s")
    salts: set[str] = set()
    for state in ({"tenant": tenants[0]}, {"tenant": tenants[1]}, {}):
        request = Request({"type": "http", "state": state})
        salts |= {salt_of(request, body), salt_of(request, GenerationBody(model="m"))}
    assert len(salts) == 6


def test_keys_are_not_kept() -> None:
    assert "first-key" not in repr(vars(ApiKeys(KEYS)))


def test_a_browser_may_ask_from_an_allowed_origin(http: httpx.Client) -> None:
    asking = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        # The second is one of those that the official client sends.
        "Access-Control-Request-Headers": "authorization, x-stainless-lang",
    }
    response = http.options("/v1/chat/completions", headers=asking)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-lang" in response.headers["access-control-allow-headers"]
    refused = http.get("/v1/models", headers={"Origin": ORIGIN})
    assert "retry-after" in refused.headers["access-control-expose-headers"]
    other = http.options(
        "/v1/chat/completions", headers=asking | {"Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in other.headers


def test_no_origin_is_allowed_by_default(make_service: MakeService) -> None:
    with running(make_service()) as url, client(url) as http:
        response = http.get("/v1/models", headers={"Origin": ORIGIN})
        assert "access-control-allow-origin" not in response.headers
