"""Packing and the head on supervised tokens change the cost of the loss, not the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lifecycle.data.packing import pack_samples
from lifecycle.training.batches import Batch
from lifecycle.training.objective import summed_loss
from tests.training.conftest import TINY, tiny_model

SAMPLES = [
    ([3, 4, 5, 6, 7, 8, 9], [False, False, True, True, True, False, True]),
    ([20, 21, 22], [False, True, True]),
    ([30, 29, 28, 27, 26], [False, False, False, False, True]),
    ([11, 12, 13, 14], [True, True, True, True]),
]
GEMMA = {key: value for key, value in TINY.items() if key != "model_type"} | {
    "model_type": "gemma2",
    "final_logit_softcapping": 0.5,
}
GRANITE = {**TINY, "model_type": "granite", "logits_scaling": 4.0}
GRANITE.pop("head_dim")


def model_of(changes: dict[str, Any]) -> PreTrainedModel:
    from lifecycle.training.architecture import new_config, new_model
    from tests.training.conftest import TOKENS

    return new_model(new_config(changes, TOKENS), 0).eval()


def packed() -> Batch:
    rows = pack_samples(SAMPLES, 16, pad_id=0)
    arrays = (rows.input_ids, rows.position_ids, rows.labels)
    return Batch(*(torch.from_numpy(array) for array in arrays))


def alone(model: PreTrainedModel) -> torch.Tensor:
    """The summed loss of each sample in a batch of its own, by the whole head."""
    total = torch.zeros(())
    for ids, trained in SAMPLES:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        for place in range(1, len(ids)):
            if trained[place]:
                total = total + cross_entropy(logits[place - 1], torch.tensor(ids[place]))
    return total


@pytest.mark.parametrize("architecture", [TINY, GEMMA, GRANITE], ids=lambda a: a["model_type"])
def test_packed_loss_and_gradients_are_those_of_the_samples_alone(
    architecture: dict[str, Any],
) -> None:
    model = model_of(architecture)
    loss, count = summed_loss(model, packed())
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    expected = alone(model)
    expected.backward()
    assert count == sum(sum(trained[1:]) for _, trained in SAMPLES)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for mine, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, weight.grad, atol=1e-5, rtol=1e-4)


def test_the_head_is_whole_again_afterwards() -> None:
    model = tiny_model().eval()
    summed_loss(model, packed())
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50)


def test_rows_without_supervision_cost_nothing_and_break_nothing() -> None:
    batch = packed()
    nothing = Batch(batch.input_ids, batch.position_ids, torch.full_like(batch.labels, -100))
    loss, count = summed_loss(tiny_model(), nothing)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
