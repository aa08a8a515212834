"""The text layer against transformers: same ids, same rendering."""

from __future__ import annotations

import json
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle.data.chat import ChatTokenizer
from lifecycle.data.template import ChatTemplate
from lifecycle.errors import CheckpointError, DataError
from tests.data.chats import CHAT, with_template

FOLDERS = ("stories260K/hf", "minimind_tokenizer")
TEXTS = (
    "",
    " ",
    "Once upon a time",
    "  two  spaces\n\nand\ttabs ",
    "你好吗 😀 é e\u0301",
    "<s>user\nhi</s>\n<s>assistant\n",
    "x" * 300,
)


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, data_dir: Path) -> Path:
    return data_dir / request.param


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_same_ids_and_text_as_transformers(folder: Path) -> None:
    ours, theirs = ChatTokenizer.load(folder), reference(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert theirs.eos_token_id in ours.eos_token_ids


def test_other_threads_run_while_a_long_text_is_encoded(data_dir: Path) -> None:
    chat = ChatTokenizer.load(data_dir / "stories260K/hf")
    encoding = threading.Thread(target=chat.encode, args=("a" * 500_000,))
    encoding.start()
    ticks = 0
    while encoding.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 5


@pytest.mark.parametrize("flags", [(True, False), (True, True), (False, False)])
def test_the_tokenizer_file_decides_what_is_added_as_in_transformers(
    data_dir: Path, tmp_path: Path, flags: tuple[bool, bool]
) -> None:
    shutil.copy(data_dir / "stories260K/hf/tokenizer.json", tmp_path)
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    added = {"add_bos_token": flags[0], "add_eos_token": flags[1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | added))
    assert ChatTokenizer.load(tmp_path).encode("hi") == reference(tmp_path).encode("hi")


def test_renders_every_template_as_transformers(universal: Path, data_dir: Path) -> None:
    theirs = reference(universal)
    templates = sorted((data_dir / "chat_templates").glob("*.jinja"))
    needs_tools = {"NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja"}
    assert len(templates) == 13
    for path in (path for path in templates if path.name not in needs_tools):
        source = path.read_text(encoding="utf-8")
        ours = with_template(universal, source)
        for messages, prompt in ((CHAT, False), (CHAT[:3], True), (CHAT[:1], True)):
            expected = theirs.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render(messages, prompt) == expected, path.name
            assert ours.encode_chat(messages, prompt) == theirs.encode(
                expected, add_special_tokens=False
            )


def test_variables_reach_the_template_but_replace_nothing(universal: Path, data_dir: Path) -> None:
    source = (data_dir / "chat_templates/Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    chat = with_template(universal, source)
    tools = [{"type": "function", "function": {"name": "f", "description": "é <b>"}}]
    expected = reference(universal).apply_chat_template(
        CHAT[:1], chat_template=source, tools=tools, tokenize=False, enable_thinking=False
    )
    assert chat.render(CHAT[:1], tools=tools, enable_thinking=False, eos_token="!") == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9].content.strip() }}", "refused the messages"),
        ("{% for m in %}", "line 1 of the chat template"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__() }}", "refused the messages"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "wrote more than"),
        ("{{ [0] * 10 ** 15 }}", "refused the messages"),
        (" " * 300_000, "more than 262,144 are refused"),
    ],
)
def test_a_bad_template_is_a_data_error(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        ChatTemplate(template, {}).render(CHAT)


def test_without_a_template_only_text_works(data_dir: Path) -> None:
    chat = ChatTokenizer.load(data_dir / "stories260K/hf")
    assert chat.chat_template is None and chat.template_digest is None
    with pytest.raises(DataError, match="no chat template"):
        chat.encode_chat(CHAT)


def test_inline_template_file_wins_and_eos_ids_are_joined(universal: Path) -> None:
    config = json.loads((universal / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "inline"}]
    config["eos_token"] = {"__type": "AddedToken", "content": "</s>"}
    (universal / "tokenizer_config.json").write_text(json.dumps(config))
    (universal / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (universal / "config.json").write_text('{"eos_token_id": 7}')
    assert ChatTokenizer.load(universal).render(CHAT) == "inline"
    chat = with_template(universal, "file")
    assert chat.render(CHAT) == "file"
    assert chat.eos_token_ids == {2, 5, 6, 7}


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no tokeniser"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("generation_config.json", b'{"eos_token_id": "</s>"}'),
        ("config.json", b'{"eos_token_id": [1, 2.5]}'),
    ],
)
def test_a_damaged_file_is_named(universal: Path, name: str, content: bytes) -> None:
    (universal / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        ChatTokenizer.load(universal)


@pytest.fixture(scope="module")
def loaded(data_dir: Path) -> list[ChatTokenizer]:
    return [ChatTokenizer.load(data_dir / name) for name in FOLDERS]


@given(data=st.data(), which=st.integers(0, len(FOLDERS) - 1), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_streamed_pieces_are_the_decoded_text(
    loaded: list[ChatTokenizer], data: st.DataObject, which: int, skip: bool
) -> None:
    chat = loaded[which]
    texts = st.text(max_size=20).map(lambda text: chat.encode(text))
    noise = st.lists(st.integers(0, chat.vocab_size + 3), max_size=30)
    low = st.lists(st.integers(0, 300), max_size=30)
    parts = data.draw(st.lists(texts | noise | low, max_size=4))
    ids = [token for part in parts for token in part]
    stream = chat.stream(skip)
    pieces = [stream.push(token) for token in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == chat.decode(ids, skip)


def test_text_is_streamed_as_soon_as_it_is_certain(loaded: list[ChatTokenizer]) -> None:
    for chat in loaded:
        ids = chat.encode("Once upon a time 😀 there", add_special_tokens=False)
        stream = chat.stream()
        lengths = [0]
        for token in ids:
            lengths.append(lengths[-1] + len(stream.push(token)))
        text = chat.decode(ids)
        assert lengths[-1] == len(text)
        assert sum(now > before for before, now in pairwise(lengths)) >= 6
