"""The contract between graph builder and engines for LoRA slots: `adapters.json`, tensor names.

A model with slots has a second graph over the same weights, `adapters.onnx`, which adds
x · A · B to its products, of another adapter for each row of a step. Its inputs are those of the
plain graph (see `decoder`) and, for the N adapters at hand in a step:

| input | type, shape | meaning |
|---|---|---|
| `adapter_tokens` | int64 [N, Q] | where in T the tokens of each adapter stand; any index beyond them |
| `adapter_places` | int64 [T, 2] | where in [N, Q] each packed token stands |
| `adapters.{product}.a` | float32 [N, in, modules * rank] | A of each module, transposed, one beside the other |
| `adapters.{product}.b{k}` | float32 [N, rank, out] | B of module k, transposed and scaled |

With our kernels a product of integers has one input instead, `adapters.{product}`, uint8 [N, bytes] (see
`lifecycle.engines.packed_adapter`).

Keep Q at 2 or more: with one row the products take another way, whose sums differ in their last
bits. With Q >= 2 what a row gets does not depend on the other rows of the step.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lifecycle.engines.packed_adapter import packed_bytes
from lifecycle.errors import EngineError

FILE = "adapters.json"
GRAPH = "adapters.onnx"
TOKENS, PLACES = "adapter_tokens", "adapter_places"
FIRST = ".a"
"""How the names of the matrices A end."""
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer of the checkpoint."""

    name: str
    """Its path in the model, such as `model.layers.0.self_attn.q_proj`."""
    rows: int
    """Its outputs."""


@dataclass(frozen=True, slots=True)
class Product:
    """One or more modules that read the same activations, computed together by the graph."""

    name: str
    width: int
    """Inputs of each module."""
    modules: tuple[Module, ...]
    heads: int = 0
    """If not 0, the module stores the rows of q, k and v head by head, of so many heads; the
    graph has all of q, then all of k, then all of v."""

    @property
    def packed(self) -> str:
        """The input for all its matrices, in bytes."""
        return f"adapters.{self.name}"

    @property
    def a(self) -> str:
        """The input for the matrices A."""
        return self.packed + FIRST

    def b(self, k: int) -> str:
        """The input for the matrix B of module `k`."""
        return f"{self.packed}.b{k}"


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """What adapters a graph has room for."""

    slots: int
    """Adapters that can be loaded together."""
    rank: int
    """The largest rank of an adapter; smaller ones are filled up with zeros."""
    products: tuple[Product, ...]

    def shapes(self, inputs: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """The shape of each input for one adapter, by name; `inputs` are those of a graph, of whose products some
        may take bytes."""
        found: dict[str, tuple[int, ...]] = {}
        for product in self.products:
            if product.packed in inputs:
                columns = [module.rows for module in product.modules]
                found[product.packed] = (packed_bytes(product.width, self.rank, columns),)
                continue
            found[product.a] = (product.width, len(product.modules) * self.rank)
            for k, module in enumerate(product.modules):
                found[product.b(k)] = (self.rank, module.rows)
        return found

    def save(self, folder: Path) -> None:
        """Write `adapters.json`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> AdapterLayout | None:
        """Read `adapters.json`; None for a model without slots.

        Raises:
            EngineError: the file is broken or from a newer version.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise EngineError(
                    f"{path} has format {values['format']}, this version reads {FORMAT}: "
                    "upgrade lifecycle-toolkit or export the model again"
                )
            products = tuple(_product(entry) for entry in values["products"])
            return cls(_positive(values, "slots"), _positive(values, "rank"), products)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EngineError(f"{path} is damaged ({error}); export the model again") from error


def _product(entry: Any) -> Product:
    modules = tuple(Module(str(m["name"]), _positive(m, "rows")) for m in entry["modules"])
    heads = int(entry["heads"])
    if not modules or heads < 0 or (heads and any(m.rows % (3 * heads) for m in modules)):
        raise ValueError(f"{entry['name']} has modules that do not fit together")
    return Product(str(entry["name"]), _positive(entry, "width"), modules, heads)


def _positive(entry: Any, name: str) -> int:
    if (value := int(entry[name])) < 1:
        raise ValueError(f"{name} is {value}")
    return value
