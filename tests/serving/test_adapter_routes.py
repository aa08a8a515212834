"""Adapters that an operator loads, replaces and unloads over HTTP while requests run."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from lifecycle.bundle.manifest import write_manifest
from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.peft import WEIGHTS
from lifecycle.errors import RecipeError
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from serving.cards import ModelCard
from serving.cli import serve
from serving.service import Service, open_service
from serving.settings import ServerSettings
from tests.serving.conftest import COMPANIONS
from tests.serving.running import client, running, wait_until
from tests.serving.steps import Steps
from tests.serving.test_cli import serving, url_of
from tests.serving.test_errors import error_of
from tests.serving.test_metrics import scrape, value

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PROMPT = [5, 9, 300, 7, 41, 8]
LENGTH = 40


@pytest.fixture(scope="module")
def folder(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two slots in `base`, and three adapters that PEFT has made in `adapters`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("routes")
    (root / "base").mkdir()
    export_decoder(chat_model, root / "base", Cpu(), slots=(2, 4))
    for name in COMPANIONS:
        (root / "base" / name).write_bytes((chat_model / name).read_bytes())
    write_manifest(root / "base", {"name": "base", "gated": False})
    for n, name in enumerate("xyz"):
        torch.manual_seed(n)
        config = LoraConfig(
            r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False
        )
        model = AutoModelForCausalLM.from_pretrained(chat_model)
        with warnings.catch_warnings():
            # PEFT reads what transformers is about to rename.
            warnings.simplefilter("ignore", FutureWarning)
            get_peft_model(model, config).save_pretrained(str(root / "adapters" / name))
    return root


@pytest.fixture(scope="module")
def texts(folder: Path) -> dict[str, str]:
    """What each adapter alone says to the prompt."""
    engine, tokenizer = OnnxEngine.open(folder / "base"), ChatTokenizer.load(folder / "base")
    found: dict[str, str] = {}
    for name in "xyz":
        engine.load_adapter("a", folder / "adapters" / name, replace=name != "x")
        tokens = list(PROMPT)
        for _ in range(LENGTH):
            tokens.append(int(engine.logits(tokens, "a")[-1].argmax()))
        found[name] = tokenizer.decode(tokens[len(PROMPT) :])
    assert len(set(found.values())) == 3
    return found


@contextmanager
def served(
    folder: Path, *, evict: bool = False, fixed: str = "", checkpoint: Path | None = None
) -> Iterator[tuple[httpx.Client, Service]]:
    """A server asked with the operator's key."""
    options = EngineOptions(max_num_seqs=4, prefix_cache_bytes=1 << 20, prefill_chunk=4)
    adapters = {name: folder / "adapters" / name for name in fixed}
    service = open_service(
        checkpoint or folder / "base",
        engine="pytorch" if checkpoint else "onnxruntime",
        options=options,
        adapters=adapters,
    )
    settings = ServerSettings(
        admin_keys=("admin",), adapter_root=folder / "adapters", evict_adapters=evict
    )
    with running(service, settings) as url, client(url, "admin") as http:
        yield http, service


def ask(http: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}
    answer = http.post("/v1/completions", json=body | {"ignore_eos": True}).raise_for_status()
    return answer.json()["choices"][0]["text"]


def load(http: httpx.Client, name: str, path: object, **fields: object) -> httpx.Response:
    return http.post(LOAD, json={"lora_name": name, "lora_path": str(path)} | fields)


def models(http: httpx.Client) -> list[str]:
    return [model["id"] for model in http.get("/v1/models").json()["data"]]


def test_they_come_and_go(folder: Path, texts: dict[str, str]) -> None:
    with served(folder) as (http, _):
        shown = load(http, "org/a", "x").raise_for_status().json()
        assert models(http) == ["base", "org/a"]
        assert shown == http.get("/v1/models/org/a").json() and shown["parent"] == "base"
        assert load(http, "b", folder / "adapters" / "y").status_code == 200
        assert (ask(http, "org/a"), ask(http, "b")) == (texts["x"], texts["y"])
        assert "'b' already" in error_of(load(http, "b", "z"), 400)["message"]
        assert "2 adapter slots are taken" in error_of(load(http, "c", "z"), 400)["message"]
        assert load(http, "b", "z", load_inplace=True).status_code == 200
        assert ask(http, "b") == texts["z"]
        found = scrape(http)
        for name, count in (("org/a", LENGTH), ("b", 2 * LENGTH)):
            assert value(found, "generation_tokens_total", model_name=name) == count
        gone = http.post(UNLOAD, json={"lora_name": "org/a"}).raise_for_status()
        assert gone.json() == {"id": "org/a", "object": "model", "deleted": True}
        assert models(http) == ["base", "b"]
        body = {"model": "org/a", "prompt": PROMPT}
        assert error_of(http.post("/v1/completions", json=body), 404)["code"] == "model_not_found"
        for name in ("org/a", "base"):
            error = error_of(http.post(UNLOAD, json={"lora_name": name}), 404)
            assert error["param"] == "lora_name" and "this server has 'b'" in error["message"]
        assert "is the model" in error_of(load(http, "base", "x"), 400)["message"]


def test_a_checkpoint_takes_them_as_it_is(
    chat_model: Path, folder: Path, texts: dict[str, str]
) -> None:
    with served(folder, checkpoint=chat_model, fixed="x") as (http, _):
        assert load(http, "second", folder / "adapters" / "y").status_code == 200
        assert [ask(http, name) for name in ("x", "second")] == [texts["x"], texts["y"]]


def test_requests_that_run_end_with_what_they_began(folder: Path, texts: dict[str, str]) -> None:
    """Two swaps under running streams: one by replacing, one by unloading and loading."""
    with served(folder) as (http, service), ThreadPoolExecutor(2) as pool:
        with Steps(service) as steps:
            load(http, "a", "x").raise_for_status()
            old = pool.submit(ask, http, "a")
            wait_until(lambda: steps.rows == [1])
            for _ in range(LENGTH // 2):
                steps.go()
            load(http, "a", "y", load_inplace=True).raise_for_status()
            new = pool.submit(ask, http, "a")
            wait_until(lambda: steps.rows[-1] == 2)
            error = error_of(load(http, "a", "z", load_inplace=True), 400)
            assert "all 2 adapter slots are taken (1 until requests have ended)" in error["message"]
            while steps.rows[-1] == 2:
                steps.go()
            assert old.result() == texts["x"]
            http.post(UNLOAD, json={"lora_name": "a"}).raise_for_status()
            load(http, "a", "z").raise_for_status()
            assert models(http) == ["base", "a"]
            newest = pool.submit(ask, http, "a")
            wait_until(lambda: steps.rows[-1] == 2)
            assert not new.done()
        assert newest.result() == texts["z"]
        assert new.result() == texts["y"]


def test_an_answer_is_signed_by_what_gave_it(
    folder: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its adapter was replaced while its text was tokenised."""
    with served(folder) as (http, service), ThreadPoolExecutor(1) as pool:
        load(http, "a", "x").raise_for_status()
        begun, gate = threading.Event(), threading.Event()

        def gated(text: str, **options: bool) -> list[int]:
            begun.set()
            assert gate.wait(60)
            return PROMPT

        body = {"model": "a", "prompt": "x", "max_tokens": LENGTH, "temperature": 0}
        monkeypatch.setattr(service.tokenizer, "encode", gated)
        asked = pool.submit(http.post, "/v1/completions", json=body | {"ignore_eos": True})
        assert begun.wait(60)
        load(http, "a", "y", load_inplace=True).raise_for_status()
        gate.set()
        answer = asked.result().raise_for_status().json()
        assert answer["choices"][0]["text"] == texts["y"]
        assert answer["system_fingerprint"] == service.cards["a"].fingerprint


def test_reading_an_adapter_holds_nobody_up(folder: Path) -> None:
    with served(folder) as (http, service), ThreadPoolExecutor(1) as pool:
        gate, reading = threading.Event(), threading.Event()
        read = service.adapters._read

        def gated(folder: Path) -> Any:
            reading.set()
            assert gate.wait(60)
            return read(folder)

        service.adapters._read = gated
        loading = pool.submit(load, http, "a", "x")
        assert reading.wait(60)
        assert ask(http, "base")
        assert models(http) == ["base"] and not loading.done()
        gate.set()
        assert loading.result().status_code == 200
        assert models(http) == ["base", "a"]


def test_the_one_asked_for_least_recently_goes_if_the_operator_lets_it(
    folder: Path, texts: dict[str, str]
) -> None:
    with served(folder, evict=True, fixed="x") as (http, _):
        load(http, "a", "y").raise_for_status()
        ask(http, "a")
        # `x` was asked for less recently, but the operator began with it.
        load(http, "b", "z").raise_for_status()
        assert models(http) == ["base", "x", "b"]
        assert (ask(http, "x"), ask(http, "b")) == (texts["x"], texts["z"])
        assert error_of(http.post("/v1/completions", json={"model": "a", "prompt": "x"}), 404)


def test_what_was_loaded_again_may_go_whoever_began_with_it(
    folder: Path, texts: dict[str, str]
) -> None:
    with served(folder, evict=True, fixed="x") as (http, _):
        http.post(UNLOAD, json={"lora_name": "x"}).raise_for_status()
        load(http, "x", "x").raise_for_status()
        load(http, "a", "y").raise_for_status()
        load(http, "b", "z").raise_for_status()
        assert models(http) == ["base", "a", "b"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ((13, "Permission denied", WEIGHTS), f"x/{WEIGHTS} cannot be read: Permission denied"),
        ((5, "Input/output error"), "x cannot be read: Input/output error"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: tuple[Any, ...], said: str
) -> None:
    # The root user may read all files, so the refusal is feigned.
    def refused(*_: object) -> ModelCard:
        files = (str(folder / "adapters" / "x" / name) for name in error[2:])
        raise OSError(*error[:2], *files)

    monkeypatch.setattr("serving.adapters.adapter_card", refused)
    with served(folder) as (http, _):
        assert error_of(load(http, "a", "x"), 400)["message"] == f"lora_path: {said}"
        assert models(http) == ["base"]


def test_only_what_lies_in_the_directory_is_read(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    shutil.copytree(folder / "adapters", root)
    shutil.copytree(folder / "adapters" / "x", tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "inner").symlink_to(root / "x")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("")
    shutil.copytree(root / "x", root / "half")
    (root / "half" / "adapter_model.safetensors").unlink()
    (root / "half" / "adapter_model.safetensors").symlink_to(
        tmp_path / "outside" / "adapter_model.safetensors"
    )
    (root / "empty").mkdir()
    (tmp_path / "base").symlink_to(folder / "base")
    with served(tmp_path) as (http, _):
        for path in (
            "../outside",
            "x/../../outside",
            "x/../x",
            tmp_path / "outside",
            "/etc",
            "link",
            "half",
            "loop",
            "file",
            "none",
            "x" * 1024,
            "x\0",
            "~/x",
        ):
            error = error_of(load(http, "a", path), 400)
            assert error["param"] == "lora_path"
            assert (
                f"no folder {str(path)[:200]!r} inside the server's adapter directory"
                in error["message"]
            )
        error = error_of(load(http, "a", "empty"), 400)
        assert "it has to hold adapter_config.json" in error["message"]
        config = root / "y" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
        error = error_of(load(http, "a", "y"), 400)
        assert "lora_path: y/adapter_config.json: use_dora is True" in error["message"]
        assert str(tmp_path) not in error["message"]
        assert models(http) == ["base"]
        for name in ("inner", "x/"):
            load(http, name.strip("/"), name).raise_for_status()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_name": "../a"}, "lora_name"),
        ({"lora_name": ""}, "lora_name"),
        ({"lora_name": "a" * 129}, "lora_name"),
        ({"lora_name": "a\nb"}, "lora_name"),
        ({"lora_name": "a\n"}, "lora_name"),
        ({"lora_path": ""}, "lora_path"),
        ({"lora_path": 5}, "lora_path"),
        ({"lora_path": "\ud800"}, "lora_path"),
        ({"load_inplace": "yes"}, "load_inplace"),
        ({"load_in_place": True}, "load_in_place"),
    ],
)
def test_wrong_bodies(running_server: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"lora_name": "a", "lora_path": "x"} | fields)
    headers = {"Content-Type": "application/json"}
    assert error_of(running_server.post(LOAD, content=body, headers=headers), 400)["param"] == param


@pytest.fixture(scope="module")
def running_server(folder: Path) -> Iterator[httpx.Client]:
    with served(folder) as (http, _):
        yield http


def test_only_the_operator_may(folder: Path) -> None:
    """Also on a server that answers anybody."""
    body = {"lora_name": "a", "lora_path": "x"}
    for keys in ((), ("client",)):
        settings = ServerSettings(
            api_keys=keys, admin_keys=("admin",), adapter_root=folder / "adapters"
        )
        with running(open_service(folder / "base"), settings) as url:
            for key in (None, "wrong"):
                with client(url, key) as http:
                    for path in (LOAD, UNLOAD):
                        error_of(http.post(path, json=body), 401)
                    assert http.get("/v1/models").status_code == (401 if keys else 200)
            for key in keys:
                with client(url, key) as http:
                    for path in (LOAD, UNLOAD):
                        error = error_of(http.post(path, json=body), 403)
                        assert error["code"] == "admin_key_required"
                    assert models(http) == ["base"]
            with client(url, "admin") as http:
                load(http, "a", "x").raise_for_status()
                assert models(http) == ["base", "a"]
    service, settings = open_service(folder / "base"), ServerSettings(admin_keys=("admin",))
    with running(service, settings) as url, client(url, "admin") as http:
        error_of(load(http, "a", "x"), 404)


def test_the_command_line(folder: Path, tmp_path: Path, texts: dict[str, str]) -> None:
    keys, empty = tmp_path / "keys", tmp_path / "empty"
    keys.write_text("admin\n")
    empty.write_text("\n")
    root = folder / "adapters"
    for options, said in (
        (["--evict-adapters"], "is for adapters from --adapter-root"),
        (["--adapter-root", root], "give --admin-key-file"),
        (["--adapter-root", keys, "--admin-key-file", keys], "is no folder"),
        (["--adapter-root", root, "--admin-key-file", empty], "holds no API key"),
        (["--adapter-root", root, "--admin-key-file", root], "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=said):
            serve([str(folder / "base"), *map(str, options)])
    options = ("--adapter-root", root, "--admin-key-file", keys)
    with (
        serving(folder / "base", *options) as process,
        client(url_of(process), "admin") as http,
    ):
        load(http, "a", "x").raise_for_status()
        assert ask(http, "a") == texts["x"]
