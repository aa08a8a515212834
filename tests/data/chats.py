"""A conversation, and a folder made into a tokeniser with a template."""

from __future__ import annotations

from pathlib import Path

from lifecycle.data.chat import ChatTokenizer

CHAT = [
    {"role": "user", "content": "What is the capital of France? "},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?\nIn a word."},
    {"role": "assistant", "content": "It is:\nRome 😀"},
]


def with_template(folder: Path, template: str) -> ChatTokenizer:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ChatTokenizer.load(folder)
