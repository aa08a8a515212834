"""What is minimised: cross-entropy of the supervised tokens, and nothing computed for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lifecycle.data.packing import IGNORED
from lifecycle.training.batches import Batch


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The cross-entropy in nats, summed over the supervised tokens, and their number.

    Samples that share a row do not see each other: without an attention mask transformers
    derives a block-diagonal one from the restarts of `position_ids`.
    """
    wanted = pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
    places = (wanted != IGNORED).nonzero().flatten()
    with _head_only_at(model, places):
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    loss = cross_entropy(output.logits[0].float(), wanted[places], reduction="sum")
    return loss, len(places)


@contextmanager
def _head_only_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Inside, the output head sees only `places` of the flattened tokens, and the logits are
    [1, places, vocabulary].

    A hook keeps what the architecture does around its head, such as scaling or capping logits.
    """

    def select(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].flatten(0, 1).index_select(0, places).unsqueeze(0)

    head = cast("nn.Module", cast(Any, model).get_output_embeddings())
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
