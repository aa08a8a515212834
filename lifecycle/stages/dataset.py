"""Read conversations from a file, check every row, and hold a part of them out."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lifecycle.errors import DataError, PluginError
from lifecycle.kinds import Conversations
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, SourcePath, Stage

if TYPE_CHECKING:
    from lifecycle.data.conversations import Loaded

DEFAULT_HOLDOUT = 0.1


def _known_format(name: str) -> str:
    from lifecycle.data.formats import AUTO, load_format

    if name != AUTO:
        try:
            load_format(name)
        except PluginError as error:
            raise ValueError(str(error)) from error
    return name


class Dataset(Stage):
    """Conversations from a jsonl, json, csv or parquet file, split into train and test."""

    produces = Conversations
    version = 2

    path: SourcePath
    """The file to read."""
    test_path: SourcePath | None = None
    """A file for the test split; without it a part of `path` is held out. Conversations of
    `path` that begin with the same question as one of it are dropped."""
    format: Annotated[str, AfterValidator(_known_format)] = "auto"
    """The shape of the rows (messages, alpaca, sharegpt, prompt-completion), or `auto`."""
    holdout: float | None = Field(None, ge=0)
    """What is held out of `path`: a fraction below 1, or a number of rows. Unset it is 0.1, or
    nothing with a `test_path`."""
    seed: int = 0
    """Another seed holds out other rows."""
    max_rows: int | None = Field(None, ge=1)
    """Read no more different conversations than that from each file."""
    system: str | None = None
    """A system message for conversations that have none."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with a row that cannot be used; malformed files are errors in any case."""

    @model_validator(mode="after")
    def _check_holdout(self) -> Self:
        holdout = self.holdout or 0
        if holdout > 1 and holdout != int(holdout):
            raise ValueError(f"'holdout' is a fraction below 1 or whole rows, not {holdout}")
        if holdout and self.test_path:
            raise ValueError("give either 'holdout' or 'test_path'")
        return self

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.data.conversations import question_of, write_conversations

        test_file = self._load(ctx, self.test_path) if self.test_path else None
        asked = set(map(question_of, test_file.conversations.values())) if test_file else ()
        file = self._load(ctx, self.path, asked)
        held_out = set[str]() if test_file else self._held_out(file)
        train = [row for key, row in file.conversations.items() if key not in held_out]
        test = [row for key, row in file.conversations.items() if key in held_out]
        if test_file:
            test = list(test_file.conversations.values())
        if not train:
            raise DataError(f"{self.path}: all rows are held out; lower 'holdout'")
        if not test:
            ctx.progress.log("no row is held out; the test split is empty")

        report = {"train": len(train), "test": len(test), "file": file.summary()}
        if test_file:
            report["test_file"] = test_file.summary()
        write_conversations(ctx.out, train, test, report)
        dropped = {reason: entry.count for reason, entry in sorted(file.dropped.items())}
        return {"train": len(train), "test": len(test), "read": file.read, "dropped": dropped}

    def _load(self, ctx: Context, path: Path, exclude: Container[str] = ()) -> Loaded:
        from lifecycle.data.conversations import load_conversations

        loaded = load_conversations(
            path,
            format=self.format,
            system=self.system,
            max_rows=self.max_rows,
            drop_bad_rows=self.on_bad_row == "drop",
            exclude=exclude,
        )
        for reason, dropped in sorted(loaded.dropped.items()):
            ctx.progress.log(f"{path.name}: {dropped} dropped: {reason}")
        return loaded

    def _held_out(self, file: Loaded) -> set[str]:
        """The same question, however it goes on, is in one split only."""
        from lifecycle.data.conversations import question_of
        from lifecycle.data.split import held_out_keys

        question = {key: question_of(rows) for key, rows in file.conversations.items()}
        holdout = DEFAULT_HOLDOUT if self.holdout is None else self.holdout
        chosen = held_out_keys(list(question.values()), holdout, self.seed)
        return {key for key in question if question[key] in chosen}
