"""Train a language model further on conversations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lifecycle.errors import DataError, StageError
from lifecycle.kinds import Conversations, HfModel
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage
from lifecycle.training.adapters import Adapter, Lora
from lifecycle.training.settings import LoopSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lifecycle.data.chat import ChatTokenizer
    from lifecycle.data.packing import PackedSamples


class Finetune(LoopSettings, Stage):
    """Train an adapter, or all weights, of a causal language model on conversations.

    Only what the assistant says is trained, each message with its end-of-turn token. Short
    conversations share a row without seeing each other.
    """

    produces = HfModel
    version = 2

    model: Ref[HfModel]
    """The model to tune; its chat template renders the conversations."""
    data: Ref[Conversations]
    """What to train on; its test split gives `loss` and `perplexity`."""
    adapter: Adapter | None = Lora()
    """The method that trains few weights beside the frozen model; null trains all weights."""
    learning_rate: float = Field(2e-4, gt=0)
    """The highest learning rate, reached at the end of the warm-up."""
    on_long: Literal["truncate", "drop"] = "truncate"
    """What happens to conversations longer than `context_length`; they are counted."""

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.data.chat import ChatTokenizer
        from lifecycle.training.loop import Loop
        from lifecycle.training.models import load_base
        from lifecycle.training.runtime import isolated

        base = ctx.input(self.model)
        if base.adapter_path is not None:
            raise StageError(
                f"'{self.model}' already has an adapter; put a merge stage before tuning it again"
            )
        tokenizer = ChatTokenizer.load(base.path)
        train, test = self._rows(ctx, tokenizer)
        with isolated(self.threads):
            model = self._trainable(load_base(base.path), train)
            loop = Loop(model, train, test, self, ctx.scratch, ctx.progress)
            metrics = loop.run()
        self._write(ctx, model, base)
        return {**metrics, **self._record(ctx, tokenizer, train)}

    def _rows(
        self, ctx: Context, tokenizer: ChatTokenizer
    ) -> tuple[PackedSamples, PackedSamples | None]:
        """The rows of the train split, and of the test split if anything in it is trained."""
        from lifecycle.training.samples import conversation_rows, log_left_out

        ctx.progress.phase("tokenising")
        data = ctx.input(self.data)
        train = conversation_rows(data, "train", tokenizer, self.context_length, self.on_long)
        log_left_out(train, self.context_length, ctx.progress)
        try:
            test = conversation_rows(data, "test", tokenizer, self.context_length, self.on_long)
        except DataError as error:
            ctx.progress.log(f"no loss on the test split: {error}")
            return train, None
        return train, test

    def _trainable(
        self, model: PreTrainedModel, rows: PackedSamples
    ) -> PeftModel | PreTrainedModel:
        """The model with what is to be trained, after a check that the data fits it."""
        import torch

        from lifecycle.training.peft_folder import put_on

        longest = getattr(model.config, "max_position_embeddings", self.context_length)
        if longest < self.context_length:
            raise StageError(
                f"context_length: {self.context_length} tokens do not fit '{self.model}', "
                f"whose max_position_embeddings is {longest}"
            )
        if rows.input_ids.max() >= model.config.vocab_size:
            raise StageError(
                f"'{self.model}' has {model.config.vocab_size} tokens, but its tokeniser writes "
                f"token {rows.input_ids.max()}; the two do not belong together"
            )
        torch.manual_seed(self.seed)
        return model if self.adapter is None else put_on(self.adapter, model)

    def _write(self, ctx: Context, model: PeftModel | PreTrainedModel, base: HfModel) -> None:
        from peft import PeftModel

        from lifecycle.training.model_folder import write_tuned
        from lifecycle.training.models import ADAPTER
        from lifecycle.training.peft_folder import save_adapter

        if isinstance(model, PeftModel):
            ctx.link(base.path)
            save_adapter(model, ctx.out / ADAPTER)
        else:
            write_tuned(model, base.path, ctx.out)

    def _record(self, ctx: Context, tokenizer: ChatTokenizer, rows: PackedSamples) -> Metrics:
        """Say in `training.json` what the model was trained on, for the stages behind."""
        from lifecycle.data.packing import IGNORED
        from lifecycle.training.model_folder import TRAINING

        record: Metrics = {
            "chat_template_sha256": tokenizer.template_digest,
            "supervised_tokens": int((rows.labels != IGNORED).sum()),
            "truncated": rows.truncated,
            "too_long": rows.too_long,
            "unsupervised": rows.unsupervised,
        }
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        # The base's own record may be a hard link into the store: replaced, never written to.
        (ctx.out / TRAINING).unlink(missing_ok=True)
        (ctx.out / TRAINING).write_text(text, encoding="utf-8")
        return record
