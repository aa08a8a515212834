"""What a graph is calibrated and compared on: texts for decoders, arrays for any graph."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

from lifecycle.data.chat import ChatTokenizer
from lifecycle.engines.decoder import DecoderInfo
from lifecycle.errors import StageError
from lifecycle.evaluation.samples import ranked_rows, select, supervised, windows
from lifecycle.graph.activations import Sample, decoder_samples
from lifecycle.kinds import Arrays, Conversations, OnnxGraph, OnnxModel, Split, Text


def read_texts(
    folder: Path,
    data: Conversations | Text,
    name: str,
    *,
    split: Split = "train",
    count: int | None,
    length: int,
) -> list[tuple[int, ...]]:
    """`count` texts, or all, of at most `length` tokens, as the decoder in `folder` reads them. `name` is
    what the recipe calls the data.

    Raises:
        StageError: there are fewer.
    """
    info = DecoderInfo.load(folder)
    context = min(length, info.long_context or info.max_position_embeddings)
    build = partial(windows, length=context) if isinstance(data, Text) else supervised
    rows = ranked_rows(data, split, name)
    found = select(rows, [ChatTokenizer.load(folder)], build, context, count)
    if count is not None and len(found.items) < count:
        raise StageError(
            f"'{name}' has {len(found.items)} texts of at most {context} tokens in its {split} "
            f"split, {count} are asked for; set samples to {len(found.items)}, or give more "
            "data or a larger sample_length"
        )
    return [sample.token_ids for (sample,) in found.items]


def read_inputs(
    model: OnnxGraph,
    data: Arrays | Conversations | Text,
    name: str,
    *,
    split: Split = "train",
    count: int | None,
    length: int,
) -> list[Sample]:
    """`count` samples for a graph, or all of the split.

    Raises:
        StageError: there are fewer, or they are of another kind than the graph reads.
    """
    if isinstance(data, Arrays):
        found: list[Sample] = list(islice(data.samples(split), count))
        if count is not None and len(found) < count:
            raise StageError(
                f"'{name}' has {len(found)} samples in its {split} split, {count} are asked for; "
                f"set samples to {len(found)}, or give more"
            )
        return found
    if not isinstance(model, OnnxModel):
        raise StageError(
            f"'{name}' is of texts, which only decoders read; a graph of another kind needs "
            f"arrays for its inputs: {{use: arrays, model: …, path: …}}"
        )
    texts = read_texts(model.path, data, name, split=split, count=count, length=length)
    return list(decoder_samples(texts))
