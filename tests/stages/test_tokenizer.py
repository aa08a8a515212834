from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifecycle.data.bpe import SPECIAL_TOKENS, train_bpe
from lifecycle.data.chat import ChatTokenizer
from lifecycle.errors import DataError
from lifecycle.stages.corpus import Corpus
from lifecycle.stages.tokenizer import TokenizerStage
from tests.conftest import RunStage

CHAT = [
    {"role": "user", "content": "def f(x):\n    return x"},
    {"role": "assistant", "content": "json"},
]


@pytest.fixture
def trained(tmp_path: Path, run_stage: RunStage) -> Path:
    (tmp_path / "x.txt").write_text("\n".join(f"def f{i % 7}(x): return {i}" for i in range(500)))
    corpus = run_stage(Corpus(path=tmp_path / "x.txt", unit="line"))
    made = run_stage(TokenizerStage.model_validate({"data": "c", "vocab_size": 310}), c=corpus)
    assert made.metrics["vocab_size"] == 310
    assert made.metrics["characters_per_token"] > 2
    return made.path


def test_loads_in_transformers_with_the_same_ids(trained: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = ChatTokenizer.load(trained), AutoTokenizer.from_pretrained(trained)
    for text in ("def f(x):\n\treturn 1", " é😀<|im_end|>x", ""):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == expected
    assert theirs.convert_ids_to_tokens(ours.eos_token_id) == "<|im_end|>"
    assert (ours.bos_token_id, ours.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)


def test_a_message_costs_two_tokens_and_its_end_is_trained(trained: Path) -> None:
    tokenizer = ChatTokenizer.load(trained)
    answer = tokenizer.encode("json")
    ids, supervised = tokenizer.encode_supervised(CHAT)
    assert len(ids) == len(tokenizer.encode(CHAT[0]["content"])) + len(answer) + 4
    trained_ids = [token for token, flag in zip(ids, supervised, strict=True) if flag]
    assert trained_ids == [*answer, tokenizer.eos_token_id]
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id}


@given(st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_text_is_unknown(trained: Path, text: str) -> None:
    tokenizer = ChatTokenizer.load(trained)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_own_template_and_tokens(tmp_path: Path, run_stage: RunStage) -> None:
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}")
    corpus = run_stage(Corpus(path=tmp_path / "x.txt"))
    stage = TokenizerStage.model_validate(
        {
            "data": "c",
            "special_tokens": ["<|stop|>", "<|im_end|>"],
            "chat_template": tmp_path / "t.jinja",
        }
    )
    tokenizer = ChatTokenizer.load(run_stage(stage, c=corpus).path)
    assert tokenizer.encode_chat([{"role": "user", "content": ""}]) == [len(SPECIAL_TOKENS)]
    assert tokenizer.vocab_size == 256 + len(SPECIAL_TOKENS) + 1 + len(["te", "xt", "text"]) - 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"{% for m in %}", r"t\.jinja cannot be tuned with: line 1 of the chat template"),
        (b"{% for m in messages %}{{ m.content }}\n{% endfor %}", r"t\.jinja.*never learn to stop"),
        (b"caf\xe9", r"t\.jinja is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_an_own_template_must_be_fit_for_tuning(
    tmp_path: Path, run_stage: RunStage, template: bytes, message: str
) -> None:
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "t.jinja").write_bytes(template)
    corpus = run_stage(Corpus(path=tmp_path / "x.txt"))
    stage = TokenizerStage.model_validate({"data": "c", "chat_template": tmp_path / "t.jinja"})
    with pytest.raises(DataError, match=message):
        run_stage(stage, c=corpus)


def test_the_same_text_gives_the_same_tokens_on_any_number_of_threads() -> None:
    code = (
        "from lifecycle.data.bpe import train_bpe\n"
        "from lifecycle.data.python_source import read_source, source_files\n"
        "from hashlib import sha256\n"
        "texts = [read_source(p) for n, p in source_files().items() if n.startswith('a')]\n"
        "print(sha256(train_bpe(texts, 800, 2, ()).to_str().encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(digests) == 1
    assert train_bpe(["ab ab"], 300, 1, ()).get_vocab_size() > 256
