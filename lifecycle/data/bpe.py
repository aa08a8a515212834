"""Byte-level BPE: no text is unknown, and the same text always gives the same tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, *ROLES)

# One token opens a message and one ends it. ChatML's "<|im_start|>assistant\n" takes several
# tokens of a small vocabulary in each message.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' }}
{%- endif -%}
"""

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TURN,
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}
"""`tokenizer_config.json`: one token ends a document and an answer alike, so that a base model
has learned to stop before it is tuned."""


def train_bpe(
    texts: Iterable[str], vocab_size: int, min_frequency: int, special_tokens: Iterable[str]
) -> Tokenizer:
    """Learn `vocab_size` tokens (Sennrich et al. 2016), those of the 256 bytes and the special
    ones included; fewer where no further pair occurs `min_frequency` times."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(dict.fromkeys((*SPECIAL_TOKENS, *special_tokens))),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
