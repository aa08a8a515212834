"""The real command in a process of its own: start, stop, and all that can be said wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from lifecycle.errors import LifecycleError, RecipeError
from serving.cli import serve
from tests.serving.running import client, wait_until
from tests.serving.test_errors import error_of

READY = re.compile(r"^Serving (?P<name>\S+) on (?P<url>http://\S+)(?P<rest>.*)\n$")


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`lifecycle serve` as a user runs it; its first line has been read into `.ready`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lifecycle.cli", "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        process.ready = READY.match(process.stdout.readline())  # type: ignore[attr-defined]
        yield process
    finally:
        process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    ready: re.Match[str] | None = process.ready  # type: ignore[attr-defined]
    assert ready is not None
    return ready["url"]


def failure(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit code and message of a command that cannot work."""
    done = subprocess.run(
        [sys.executable, "-m", "lifecycle.cli", "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_sigterm_finishes_what_runs(stories_bundle: Path) -> None:
    with serving(stories_bundle) as process:
        url = url_of(process)
        assert "ungated" in process.ready["rest"]  # type: ignore[attr-defined]
        body = {"model": "stories", "prompt": "Once", "max_tokens": 500, "ignore_eos": True}
        with (
            client(url) as http,
            http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in events[-2]
        assert process.wait(timeout=20) == 0
        with pytest.raises(httpx.ConnectError), client(url) as http:
            http.get("/health")
        assert process.stdout is not None and process.stdout.read() == ""


def test_the_shutdown_timeout_ends_what_takes_too_long(stories_bundle: Path) -> None:
    options = ("--max-num-seqs", 1, "--max-queue", 200, "--shutdown-timeout", 0)
    with serving(stories_bundle, *options) as process:
        with long_stream(process) as lines:
            process.send_signal(signal.SIGINT)
            events = [line for line in lines if line]
        assert '"code":"draining"' in events[-1]
        assert process.wait(timeout=20) == 0


def test_a_second_signal_ends_at_once(stories_bundle: Path) -> None:
    options = ("--max-num-seqs", 1, "--max-queue", 200)
    with serving(stories_bundle, *options) as process, long_stream(process):
        process.send_signal(signal.SIGTERM)
        # Two signals that come before the first is seen to are one.
        wait_until(lambda: not is_open(process))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM


@contextmanager
def long_stream(process: subprocess.Popen[str]) -> Iterator[Iterator[str]]:
    """The lines behind the first one of an answer that takes long."""
    body = {"model": "stories", "prompt": "Once", "n": 100, "max_tokens": 500, "stream": True}
    with (
        client(url_of(process)) as http,
        http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        yield lines


def is_open(process: subprocess.Popen[str]) -> bool:
    """Whether a server's port is."""
    place = urlsplit(url_of(process))
    with socket.socket() as connection:
        return connection.connect_ex((place.hostname, place.port)) == 0


def test_the_options_reach_the_server(chat_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    options = ("--api-key-file", keys, "--served-model-name", "org/name", "--max-model-len", 64)
    with serving(chat_bundle, *options) as process:
        assert process.ready["name"] == "org/name"  # type: ignore[attr-defined]
        assert process.ready["rest"] == ""  # type: ignore[attr-defined]
        with openai.OpenAI(base_url=f"{url_of(process)}/v1", api_key="two") as api:
            model = api.models.retrieve("org/name")
            assert model.model_dump()["max_model_len"] == 64
            assert api.chat.completions.create(
                model="org/name", messages=[{"role": "user", "content": "hi"}]
            ).choices
        with client(url_of(process), "three") as http:
            error_of(http.get("/v1/models"), 401)


def test_the_key_may_come_from_the_environment(chat_bundle: Path) -> None:
    with serving(chat_bundle, LIFECYCLE_API_KEY="secret") as process:
        with client(url_of(process)) as http:
            error_of(http.get("/v1/models"), 401)
        with client(url_of(process), "secret") as http:
            assert http.get("/v1/models").status_code == 200


def test_it_serves_without_torch_and_transformers(chat_bundle: Path) -> None:
    """Even an import that would be caught is an error here."""
    program = f"""
import sys, threading, signal, os
sys.modules.update(dict.fromkeys(["torch", "transformers", "onnx", "onnx_ir", "peft"]))
import httpx2 as httpx
from serving.cli import serve
class Stop:
    def write(self, line):
        url = line.split()[3]
        def ask():
            body = {{"model": "tiny-chat", "messages": [{{"role": "user", "content": "hi"}}]}}
            print(httpx.post(url + "/v1/chat/completions", json=body).status_code, file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=ask).start()
    def flush(self): pass
sys.stdout = Stop()
sys.exit(serve([{str(chat_bundle)!r}, "--port", "0"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "200\n" in done.stderr


def test_a_missing_extra_says_how_to_install_it(chat_bundle: Path) -> None:
    program = f"""
import sys
sys.modules["uvicorn"] = None
from lifecycle.cli import main
sys.exit(main(["serve", {str(chat_bundle)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "pip install 'lifecycle-toolkit[serve]'" in done.stderr


def test_a_port_in_use_is_one_clear_error(chat_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = failure(chat_bundle, "--port", port)
    assert code == 1
    assert message.count("\n") == 1
    assert f"127.0.0.1:{port}" in message and "--port" in message


def test_a_changed_byte_is_not_served(chat_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    broken.mkdir()
    for file in chat_bundle.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = bytearray((broken / "model.onnx.data").read_bytes())
    weights[100] ^= 1
    (broken / "model.onnx.data").write_bytes(weights)
    with pytest.raises(LifecycleError, match=r"model\.onnx\.data has changed"):
        serve([str(broken), "--port", "0"])


def test_what_is_no_bundle(tmp_path: Path, chat_model: Path) -> None:
    with pytest.raises(LifecycleError, match="no bundle"):
        serve([str(tmp_path), "--port", "0"])
    with pytest.raises(LifecycleError, match="--engine pytorch"):
        serve([str(chat_model), "--port", "0"])
    with pytest.raises(LifecycleError, match="no-such-run"):
        serve(["no-such-run", "--store", str(tmp_path / "store"), "--port", "0"])


def test_an_unknown_engine_names_the_near_one(chat_bundle: Path) -> None:
    with pytest.raises(LifecycleError, match="did you mean 'onnxruntime'"):
        serve([str(chat_bundle), "--port", "0", "--engine", "onnxruntme"])


def test_providers_reach_the_engine(chat_bundle: Path, chat_model: Path) -> None:
    """A bundle that was exported for the CPU may be served elsewhere, where there is such a provider."""
    wrong = ["--provider", "cpu", "--provider", "cudda:device_id=1"]
    with pytest.raises(LifecycleError, match="the provider is 'cudda', which this onnxruntime"):
        serve([str(chat_bundle), "--port", "0", *wrong])
    with pytest.raises(LifecycleError, match="providers are ONNX Runtime's, and PyTorch runs on"):
        serve([str(chat_model), "--port", "0", "--engine", "pytorch", *wrong])


@pytest.mark.slow
def test_a_pytorch_folder_is_served_by_its_engine(chat_model: Path) -> None:
    with serving(chat_model, "--engine", "pytorch") as process, client(url_of(process)) as http:
        body = {"model": chat_model.name, "prompt": "fox", "max_tokens": 4, "temperature": 0}
        assert http.post("/v1/completions", json=body).status_code == 200


def test_an_empty_key_does_not_open_the_server(chat_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for options in (["--api-key", ""], ["--api-key-file", str(tmp_path / "empty")]):
        with pytest.raises(RecipeError, match="no API key"):
            serve([str(chat_bundle), *options])
    with pytest.raises(RecipeError, match="cannot be read"):
        serve([str(chat_bundle), "--api-key-file", str(tmp_path / "none")])
    code, message = failure(chat_bundle, LIFECYCLE_API_KEY=" ")
    assert code == 2 and "LIFECYCLE_API_KEY" in message


def test_an_open_address_without_a_key_is_warned_of(chat_bundle: Path) -> None:
    with serving(chat_bundle, "--host", "0.0.0.0") as process:
        url_of(process)
        process.terminate()
        _, log = process.communicate(timeout=20)
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S* WARNING: no API key", log, re.M)


@pytest.mark.parametrize(
    "arguments",
    [["--port", "-1"], ["--port", "x"], ["--max-num-seqs", "0"], ["--shutdown-timeout", "nan"]],
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(RecipeError, match=f"{arguments[0]}: '{arguments[1]}': give an? "):
        serve(["bundle", *arguments])


def test_a_port_out_of_range(chat_bundle: Path) -> None:
    with pytest.raises(LifecycleError, match="cannot listen"):
        serve([str(chat_bundle), "--port", "70000"])
