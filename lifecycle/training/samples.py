"""Text and conversations of the store as packed rows, with every row that is left out counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from lifecycle.data.chat import ChatTokenizer
from lifecycle.data.packing import Packed, PackedSamples, Sample, pack_documents, pack_samples
from lifecycle.errors import CheckpointError, DataError
from lifecycle.kinds import Conversations, Split, Text
from lifecycle.pipeline.stage import Progress


def text_rows(text: Text, split: Split, tokenizer: ChatTokenizer, context_length: int) -> Packed:
    """The documents of a split, one after another.

    Raises:
        DataError: they do not fill one row.
        CheckpointError: the tokeniser has no token to end a document with.
    """
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            "the tokenizer names no eos_token, which must stand between documents; "
            "name one in its tokenizer_config.json"
        )
    documents = (tokenizer.encode(row["text"]) for row in text.rows(split))
    return pack_documents(documents, context_length, tokenizer.eos_token_id)


def conversation_rows(
    data: Conversations,
    split: Split,
    tokenizer: ChatTokenizer,
    context_length: int,
    on_long: Literal["truncate", "drop"],
) -> PackedSamples:
    """The conversations of a split; the assistant's messages are supervised.

    Raises:
        DataError: a conversation cannot be rendered, or nothing is left to train on.
    """
    samples = _encoded(data, split, tokenizer)
    pad_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return pack_samples(samples, context_length, pad_id, on_long)


def _encoded(data: Conversations, split: Split, tokenizer: ChatTokenizer) -> Iterator[Sample]:
    for number, row in enumerate(data.rows(split), start=1):
        try:
            yield tokenizer.encode_supervised(row["messages"])
        except DataError as error:
            raise DataError(f"{split} split, conversation {number}: {error}") from error


def log_left_out(rows: PackedSamples, context_length: int, progress: Progress) -> None:
    """Show what packing cut off or left out."""
    counts = {
        f"were cut off after {context_length} tokens": rows.truncated,
        f"are longer than {context_length} tokens and left out": rows.too_long,
        "have no token to train on and are left out": rows.unsupervised,
    }
    for what, count in counts.items():
        if count:
            progress.log(f"{count:,} conversations {what}")
