"""Merge an adapter into its base model."""

from __future__ import annotations

from lifecycle.errors import StageError
from lifecycle.kinds import HfModel
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, Ref, Stage


class Merge(Stage):
    """Make a tuned model one plain model, in the type of the base's weights.

    The logits of the result are compared with those of base and adapter in float32
    (`max_logit_diff`); a difference that rounding does not explain stops the run.
    """

    produces = HfModel
    version = 1

    model: Ref[HfModel]
    """A model with an adapter, as `finetune` makes it."""

    def run(self, ctx: Context) -> Metrics:
        model = ctx.input(self.model)
        if model.adapter_path is None:
            raise StageError(
                f"'{self.model}' has no adapter to merge; use '{self.model}' itself wherever "
                "the merged model is meant"
            )
        from lifecycle.training.merging import merge

        ctx.progress.phase("merging")
        return merge(model.path, ctx.out)
