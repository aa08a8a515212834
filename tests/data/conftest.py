"""A real tokeniser for the templates of many models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

# Their end-of-turn tokens, as special tokens of one tokeniser that serves all templates.
ENDS = (
    *("<|im_start|>", "<|im_end|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>"),
    *("<|start|>", "<|user|>", "<|assistant|>", "<end_of_turn>", "<start_of_turn>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "<|end_of_text|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<｜User｜>", "<｜Assistant｜>"),
    "<｜end▁of▁sentence｜>",
)


@pytest.fixture
def universal(data_dir: Path, tmp_path: Path) -> Path:
    """A real tokeniser that knows the special tokens of all templates."""
    tokenizer = Tokenizer.from_file(str(data_dir / "minimind_tokenizer/tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ENDS])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path
