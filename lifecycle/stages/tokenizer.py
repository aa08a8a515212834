"""Train a byte-level BPE tokeniser with a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from lifecycle.errors import DataError
from lifecycle.kinds import Text, Tokenizer
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, SourcePath, Stage

if TYPE_CHECKING:
    from lifecycle.data.chat import ChatTokenizer


class TokenizerStage(Stage):
    """Learn the tokens of a corpus' train split: byte-level BPE."""

    produces = Tokenizer
    version = 2

    data: Ref[Text]
    """The corpus whose train split is learned."""
    vocab_size: int = Field(1024, ge=300)
    """Tokens in all, bytes and special tokens included; fewer if the corpus has no more."""
    min_frequency: int = Field(2, ge=1)
    """How often a pair must occur to become a token."""
    special_tokens: tuple[str, ...] = ()
    """Further tokens that are never split, for a chat template of your own."""
    chat_template: SourcePath | None = None
    """A Jinja file, with which a conversation can be trained; without one each message is `<|role|>content<|im_end|>`."""

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.data import bpe
        from lifecycle.data.chat import CONFIG, TEMPLATE, TOKENIZER, ChatTokenizer
        from lifecycle.data.read import read_text

        corpus = ctx.input(self.data)
        ctx.progress.phase("learning tokens")
        texts = (row["text"] for row in corpus.rows("train"))
        trained = bpe.train_bpe(texts, self.vocab_size, self.min_frequency, self.special_tokens)
        trained.save(str(ctx.out / TOKENIZER))
        config = json.dumps(bpe.CONFIG, indent=2, sort_keys=True) + "\n"
        (ctx.out / CONFIG).write_text(config, encoding="utf-8")
        own = self.chat_template
        template = bpe.CHAT_TEMPLATE if own is None else read_text(own)
        (ctx.out / TEMPLATE).write_text(template, encoding="utf-8")

        ctx.progress.phase("measuring")
        tokenizer = ChatTokenizer.load(ctx.out)
        if own is not None:
            _check_template(own, tokenizer)
        characters = tokens = 0
        for row in corpus.rows("test"):
            characters += len(row["text"])
            tokens += len(tokenizer.encode(row["text"]))
        metrics: Metrics = {"vocab_size": tokenizer.vocab_size}
        if tokens:
            metrics["characters_per_token"] = round(characters / tokens, 3)
        return metrics


def _check_template(path: Path, tokenizer: ChatTokenizer) -> None:
    """Ask of a template what tuning will ask, which is behind a whole pre-training."""
    from lifecycle.data.chat import PROBE

    try:
        tokenizer.encode_supervised(PROBE)
    except DataError as error:
        raise DataError(f"{path} cannot be tuned with: {error}") from error
