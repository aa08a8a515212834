"""Plain documents for pre-training: from files, or the standard library of this Python."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lifecycle.errors import DataError
from lifecycle.kinds import Text
from lifecycle.pipeline.artifact import Metrics
from lifecycle.pipeline.stage import Context, SourcePath, Stage

if TYPE_CHECKING:
    from lifecycle.data.text import Document


class Corpus(Stage):
    """Read plain text into documents, a part of them held out; exact duplicates are dropped."""

    produces = Text
    version = 2

    path: SourcePath | None = None
    """A text file, a file with rows (jsonl, json, csv or parquet), or a folder of them; or use
    `source`."""
    source: Literal["python-stdlib"] | None = None
    """A text that every machine has: the standard library of the Python that runs. Whole
    functions are held out there."""
    pattern: str = "**/*.txt"
    """Which files of a folder are read."""
    field: str = "text"
    """The key of the text in a row."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """What of a text file is one document; paragraphs are separated by empty lines."""
    holdout: float = Field(0.15, ge=0, lt=1)
    """The fraction of documents, or of the library's functions, that is held out."""
    seed: int = 0
    """Another seed holds out other documents; functions are chosen by their source alone."""

    @field_validator("pattern")
    @classmethod
    def _pattern_stays_inside(cls, pattern: str) -> str:
        # What lies outside the folder is no part of the fingerprint.
        if not pattern or PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
            raise ValueError(f"'{pattern}' must match files below 'path', such as **/*.txt")
        return pattern

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.source is None):
            raise ValueError("give either 'path' or 'source: python-stdlib'")
        return self

    def fingerprint(self) -> Mapping[str, Any]:
        if self.source is None:
            return {}
        from lifecycle.data.python_source import library_fingerprint

        return library_fingerprint()

    def run(self, ctx: Context) -> Metrics:
        from lifecycle.data.text import file_documents, library_documents

        if self.path is None:
            documents = library_documents(self.holdout)
        else:
            documents = file_documents(
                self.path,
                pattern=self.pattern,
                field=self.field,
                unit=self.unit,
                holdout=self.holdout,
                seed=self.seed,
            )
        count = _write(ctx, documents)
        if not count["train_documents"]:
            held = count["test_documents"]
            way = (
                f": all documents, {held}, are held out; a text file is one document unless 'unit' is "
                "paragraph or line"
            )
            raise DataError(
                f"{self.path or self.source}: there is no text to train on{way if held else ''}"
            )
        if self.holdout and not count["test_documents"]:
            ctx.progress.log(
                "no document is held out; a text file is one document unless "
                "'unit' is paragraph or line"
            )
        return dict(count)


def _write(ctx: Context, documents: Iterable[Document]) -> Counter[str]:
    count = Counter[str]()
    seen = set[str]()
    with (
        (ctx.out / "train.jsonl").open("w", encoding="utf-8") as train,
        (ctx.out / "test.jsonl").open("w", encoding="utf-8") as test,
    ):
        for text, source, held_out in documents:
            if not text.strip():
                continue
            if text in seen:
                count["duplicates"] += 1
                continue
            seen.add(text)
            row = {"text": text, "source": source}
            file = test if held_out else train
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            split = "test" if held_out else "train"
            count[f"{split}_documents"] += 1
            count[f"{split}_characters"] += len(text)
    return count
