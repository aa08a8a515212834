"""`lifecycle chat` with a piped input."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.ort import OnnxEngine
from lifecycle.engines.requests import SamplingParams
from serving.cli import chat

Output = pytest.CaptureFixture[str]


def talk(monkeypatch: pytest.MonkeyPatch, bundle: Path, lines: str, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return chat([str(bundle), *options])


def expected(bundle: Path, messages: list[dict[str, str]]) -> str:
    tokenizer = ChatTokenizer.load(bundle)
    engine = OnnxEngine.open(bundle)
    params = SamplingParams(max_tokens=8, stop_token_ids=tokenizer.eos_token_ids)
    answer = engine.generate([tokenizer.encode_chat(messages)], params)[0]
    engine.close()
    return tokenizer.decode(answer.token_ids)


def test_it_remembers_the_conversation(
    monkeypatch: pytest.MonkeyPatch, chat_bundle: Path, capsys: Output
) -> None:
    code = talk(
        monkeypatch,
        chat_bundle,
        "fox\n\ndog\n/reset\nfox\n/exit\nnever\n",
        *("--system", "Be a fox.", "--max-tokens", "8"),
    )
    assert code == 0
    messages = [{"role": "system", "content": "Be a fox."}, {"role": "user", "content": "fox"}]
    first = expected(chat_bundle, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "dog"}]
    second = expected(chat_bundle, messages)
    output = capsys.readouterr()
    assert output.out == f"{first}\n{second}\n{first}\n"
    assert output.err == ""


def test_without_a_template_it_continues_text_and_says_so(
    monkeypatch: pytest.MonkeyPatch, stories_bundle: Path, capsys: Output
) -> None:
    options = ("--temperature", "0", "--max-tokens", "8")
    assert talk(monkeypatch, stories_bundle, "Once upon a time\n", *options) == 0
    output = capsys.readouterr()
    assert output.out == ", there was a little girl\n"
    assert "no chat template" in output.err
    assert "ungated" in output.err


def test_a_refused_message_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, chat_bundle: Path, capsys: Output
) -> None:
    long = "fox " * 600
    assert talk(monkeypatch, chat_bundle, f"{long}\nfox\n", "--max-tokens", "8") == 0
    output = capsys.readouterr()
    assert "context" in output.err
    assert output.out == expected(chat_bundle, [{"role": "user", "content": "fox"}]) + "\n"


def test_sampling_is_seeded(
    monkeypatch: pytest.MonkeyPatch, chat_bundle: Path, capsys: Output
) -> None:
    def ask(seed: str) -> str:
        talk(monkeypatch, chat_bundle, "fox\n", "--temperature", "1.5", "--seed", seed)
        return capsys.readouterr().out

    assert ask("1") == ask("1") != ask("2")


class Typed(io.StringIO):
    """Lines that somebody types."""

    def isatty(self) -> bool:
        return True


def test_a_mistyped_command_is_no_message(
    monkeypatch: pytest.MonkeyPatch, chat_bundle: Path, capsys: Output
) -> None:
    monkeypatch.setattr("sys.stdin", Typed("/quit\n/exit\n"))
    assert chat([str(chat_bundle)]) == 0
    output = capsys.readouterr()
    assert output.out.replace("> ", "") == ""
    assert "there is no /quit; /reset starts a new conversation" in output.err
    # In a pipe it may be a message.
    assert talk(monkeypatch, chat_bundle, "/quit\n", "--max-tokens", "8") == 0
    assert capsys.readouterr().out == expected(chat_bundle, [ASKED]) + "\n"


ASKED = {"role": "user", "content": "/quit"}
