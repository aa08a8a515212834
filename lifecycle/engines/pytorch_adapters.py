"""LoRA adapters beside a model of transformers, added to what its linear layers give."""

# transformers and torch type their own interfaces loosely.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lifecycle.engines.adapters import AdapterLayout, Module, Product
from lifecycle.engines.base import AdapterWeights
from lifecycle.engines.peft import PeftFolder
from lifecycle.errors import EngineError

SLOTS = 32
"""Adapters loaded together. An adapter takes the memory of its weights, a free slot none, so this only bounds
what those who load by HTTP can take."""


class TorchAdapters:
    """The loaded adapters of a model, by number. The model stays as it is: linear layers have hooks while a row
    with an adapter is computed, and only then."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = dict(_linear_layers(model))
        products = tuple(
            Product(name, width, (Module(name, rows),))
            for name, module in self._modules.items()
            for width, rows in [_shape(module)]
        )
        # Nothing is filled up here, so any rank will do.
        self._layout = AdapterLayout(SLOTS, sys.maxsize, products)
        self._has_own = hasattr(model, "peft_config")
        self._loaded: dict[int, list[tuple[nn.Module, Tensor, Tensor]]] = {}
        """By number, the layers with A [in, r] and B [r, out] of each."""
        self._num_loaded = 0

    @property
    def slots(self) -> int:
        """How many can be loaded together."""
        return 0 if self._has_own else SLOTS

    def read(self, folder: Path) -> AdapterWeights:
        """As `Backend.read_adapter`."""
        if self._has_own:
            raise EngineError(
                "this model has an adapter beside it, on top of which others would come: merge that one, or "
                "open its base model"
            )
        adapter, found = PeftFolder(folder, self._layout), dict[str, NDArray[np.float32]]()
        for product in self._layout.products:
            if (update := adapter.update(product, 0)) is not None:
                found[product.a], found[product.b(0)] = update
        return found

    def load(self, weights: AdapterWeights, instead_of: int = 0) -> int:
        """As `Backend.load_adapter`."""
        updates = self._updates(weights)
        if not instead_of and len(self._loaded) >= self.slots:
            raise EngineError(f"all {self.slots} adapter slots are taken: unload one")
        if instead_of:
            self.unload(instead_of)
        self._num_loaded += 1
        self._loaded[self._num_loaded] = updates
        return self._num_loaded

    def unload(self, number: int) -> None:
        """As `Backend.unload_adapter`."""
        del self._loaded[number]

    @contextmanager
    def applied(self, number: int) -> Generator[None]:
        """Inside, the model computes with an adapter; 0 is none."""
        with ExitStack() as hooks:
            for module, a, b in self._loaded[number] if number else ():
                handle = module.register_forward_hook(_Addition(a, b))
                hooks.callback(handle.remove)
            yield

    def _updates(self, weights: AdapterWeights) -> list[tuple[nn.Module, Tensor, Tensor]]:
        left, found = dict(weights), list[tuple[nn.Module, Tensor, Tensor]]()
        for product in self._layout.products:
            if product.a not in left or product.b(0) not in left:
                continue
            a, b = left.pop(product.a), left.pop(product.b(0))
            rank = len(b)
            if (a.shape, b.shape) != ((product.width, rank), (rank, product.modules[0].rows)):
                break
            module = self._modules[product.name]
            found.append((module, torch.from_numpy(a), torch.from_numpy(b)))
        else:
            if found and not left:
                return found
        raise EngineError(
            "the adapter was read for another model: read it with this engine's read_adapter"
        )


class _Addition:
    """A hook that adds x · A · B to what a layer makes of x."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self._a, self._b = a, b

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + inputs[0] @ self._a @ self._b


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """As those with slots in a graph: all but the output head. Experts that lie in one parameter are none."""
    head: object = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


def _shape(module: Any) -> tuple[int, int]:
    """How many inputs a linear layer has, and how many outputs."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features
