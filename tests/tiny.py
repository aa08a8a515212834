"""A real Llama of 30,000 parameters that has learnt eight answers by heart."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from lifecycle.data.chat import ChatTokenizer
from lifecycle.graph.export import export_decoder
from lifecycle.graph.targets import Cpu
from lifecycle.kinds import Conversations, HfModel, OnnxModel, Text
from tests.conftest import as_artifact

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWERS = {"a": "one", "b": "two", "c": "six", "d": "ten", "e": "red", "f": "sky", "g": "cup"}


def conversation(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


ROWS = [conversation(prompt, answer) for prompt, answer in ANSWERS.items()]


def write_rows(folder: Path, test: Iterable[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("")
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return folder


def conversations(folder: Path, rows: Iterable[dict[str, Any]] = ROWS) -> Conversations:
    return as_artifact(Conversations, write_rows(folder, rows))  # pyright: ignore


def text(folder: Path, documents: Iterable[str]) -> Text:
    rows = [{"text": document, "source": "test"} for document in documents]
    return as_artifact(Text, write_rows(folder, rows))  # pyright: ignore


def write_tokenizer(folder: Path) -> None:
    """One token per ASCII letter, and a chat template."""
    letters = [*string.ascii_letters, *string.digits, "Ġ", ".", ","]
    vocab = {token: i for i, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and on a busy machine wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(folder: Path, seed: int = 0, steps: int = 60) -> HfModel:
    """Write a model that has seen `ROWS` `steps` times."""
    write_tokenizer(folder)
    tokenizer = ChatTokenizer.load(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor([tokenizer.encode_supervised(row["messages"])[0] for row in ROWS])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with one_thread():
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    return as_artifact(HfModel, folder)  # pyright: ignore


def export(model: HfModel, folder: Path) -> OnnxModel:
    folder.mkdir()
    export_decoder(model.path, folder, Cpu())
    write_tokenizer(folder)
    return as_artifact(OnnxModel, folder)  # pyright: ignore
