"""Train a new language model on plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lifecycle.errors import DataError, StageError
from lifecycle.kinds import HfModel, Text, Tokenizer
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage
from lifecycle.training.settings import LoopSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lifecycle.data.chat import ChatTokenizer
    from lifecycle.data.packing import Packed


class Pretrain(LoopSettings, Stage):
    """Train a causal language model from random weights to predict the next token of a text."""

    produces = HfModel
    version = 1

    text: Ref[Text]
    """The corpus; its test split gives `loss` and `perplexity`."""
    tokenizer: Ref[Tokenizer]
    """Its vocabulary becomes the model's."""
    architecture: Mapping[str, Any]
    """`model_type` and fields of its transformers config, such as `hidden_size`."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decay of matrices; vectors such as norms and biases are not decayed."""

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.data.chat import ChatTokenizer
        from lifecycle.training.loop import Loop
        from lifecycle.training.model_folder import write_new
        from lifecycle.training.runtime import isolated

        folder = ctx.input(self.tokenizer).path
        tokenizer = ChatTokenizer.load(folder)
        with isolated(self.threads):
            model = self._new_model(tokenizer)
            train, test = self._rows(ctx, tokenizer)
            loop = Loop(model, train, test, self, ctx.scratch, ctx.progress)
            metrics = loop.run()
        write_new(model, ctx.out)
        ctx.link(folder)
        return {**metrics, "parameters": model.num_parameters(), "tokens": train.input_ids.size}

    def _new_model(self, tokenizer: ChatTokenizer) -> PreTrainedModel:
        from transformers import GenerationConfig

        from lifecycle.training.architecture import new_config, new_model

        tokens = {
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = new_config(self.architecture, tokens)
        longest = getattr(config, "max_position_embeddings", self.context_length)
        if longest < self.context_length:
            raise StageError(
                f"context_length: {self.context_length} tokens do not fit the architecture, "
                f"whose max_position_embeddings is {longest}"
            )
        model = new_model(config, self.seed)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(tokenizer.eos_token_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        return model

    def _rows(self, ctx: Context, tokenizer: ChatTokenizer) -> tuple[Packed, Packed | None]:
        """The rows of the train split, and of the test split if it fills one."""
        from lifecycle.training.samples import text_rows

        ctx.progress.phase("tokenising")
        text = ctx.input(self.text)
        train = text_rows(text, "train", tokenizer, self.context_length)
        try:
            return train, text_rows(text, "test", tokenizer, self.context_length)
        except DataError as error:
            ctx.progress.log(f"no loss on the test split: {error}")
            return train, None
