"""Take a model from a local folder or from the Hugging Face hub."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from lifecycle.kinds import HfModel
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, SourcePath, Stage

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Checkpoint(Stage):
    """Take a Hugging Face model folder: config, safetensors, tokeniser, chat template.

    The folder is checked first, and nothing in it is ever run: code files are left behind, and
    weights that are only there as a pickle are refused.
    """

    produces = HfModel
    version = 1

    path: SourcePath | None = None
    """A local folder; or use `repo`."""
    repo: str | None = Field(None, min_length=1)
    """A model of the Hugging Face hub, such as `HuggingFaceTB/SmolLM2-135M-Instruct`. Only then
    is the network used."""
    revision: str | None = None
    """The commit of `repo`, as 40 hexadecimal digits."""

    @field_validator("revision")
    @classmethod
    def _is_commit(cls, revision: str | None) -> str | None:
        if revision is not None and not _COMMIT.fullmatch(revision):
            raise ValueError(
                f"'{revision}' is no commit of 40 hexadecimal digits; branches and tags move, "
                "so take the commit from the model's history on the hub"
            )
        return revision

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either 'path', or 'repo' with 'revision'")
        if (self.repo is None) != (self.revision is None):
            raise ValueError("'repo' and 'revision' belong together")
        return self

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.training.checkpoint import files_to_take, ignored_code, inspect

        folder = self.path
        if folder is None:
            from lifecycle.training.hub import download

            assert self.repo is not None and self.revision is not None
            ctx.progress.phase("downloading")
            folder = ctx.scratch / "download"
            download(self.repo, self.revision, folder)
        ctx.progress.phase("checking")
        metrics = inspect(folder)
        for name in ignored_code(folder):
            ctx.progress.log(f"ignored: {name} (code from a model folder is never run)")
        for path in files_to_take(folder):
            ctx.link(path.resolve(), path.name)
        return metrics
