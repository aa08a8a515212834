"""The kinds of artifacts that the built-in stages exchange, and what lies in each folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lifecycle.pipeline.artifact import Artifact

if TYPE_CHECKING:
    from numpy.typing import NDArray

Split = Literal["train", "test"]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file that a stage wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


class Text(Artifact):
    """Plain documents: `train.jsonl`, `test.jsonl`; a row is `{"text": …, "source": …}`."""

    kind = "text"

    def rows(self, split: Split) -> Iterator[dict[str, Any]]:
        """The documents of a split, in order."""
        return read_jsonl(self.path / f"{split}.jsonl")


class Tokenizer(Artifact):
    """`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""

    kind = "tokenizer"


class Conversations(Artifact):
    """`train.jsonl`, `test.jsonl`; a row is `{"messages": [{"role", "content", "train"?}]}`.

    `train: false` on an assistant message keeps it out of the loss. `report.json` counts what
    was read, kept and dropped, by reason.
    """

    kind = "conversations"

    def rows(self, split: Split) -> Iterator[dict[str, Any]]:
        """The conversations of a split, in order."""
        return read_jsonl(self.path / f"{split}.jsonl")


class HfModel(Artifact):
    """A Hugging Face folder: `config.json`, safetensors, tokeniser, chat template.

    A tuned but not merged model has its PEFT folder in `adapter/` beside the base's files.
    """

    kind = "hf-model"

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    @property
    def adapter_path(self) -> Path | None:
        """The PEFT folder, or None for a model without an adapter."""
        path = self.path / "adapter"
        return path if path.is_dir() else None


class OnnxGraph(Artifact):
    """`model.onnx`, `model.onnx.data`: any graph, its larger weights in the second file."""

    kind = "onnx-graph"


class OnnxModel(OnnxGraph):
    """The graph of a decoder, with `decoder.json`, tokeniser files and a chat template."""

    kind = "onnx-model"


class Arrays(Artifact):
    """`train.npz`, `test.npz`: samples for an `OnnxGraph`, an array for each of its inputs.

    The array of sample 12 for the input `image` is called `000012/image`.
    """

    kind = "arrays"

    def samples(self, split: Split) -> Iterator[dict[str, NDArray[Any]]]:
        """The samples of a split, in order."""
        import numpy as np

        with np.load(self.path / f"{split}.npz", allow_pickle=False) as file:
            for _, names in groupby(file.files, key=lambda name: name.partition("/")[0]):
                yield {name.partition("/")[2]: file[name] for name in names}


class Report(Artifact):
    """`report.json`: the digest of the model, what was measured, and every gate's verdict."""

    kind = "report"

    @property
    def content(self) -> dict[str, Any]:
        """`report.json`."""
        return json.loads((self.path / "report.json").read_text(encoding="utf-8"))


class Bundle(Artifact):
    """What is served: the files of an `OnnxModel`, `manifest.json`, `generation_config.json`
    and a model card."""

    kind = "bundle"
