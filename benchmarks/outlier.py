"""What a request with large activations does to its neighbours in a batch, by scheme.

    python -m benchmarks.outlier CHECKPOINT [--factor 30] [--json]

Whatever a product reads is scaled by FACTOR at the tokens of one request of eight, whose token no
other request has. Printed is how far the logits of the other seven are from those that they have
beside an ordinary request, as a part of their largest: the worst of all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.arguments import parser_of
from lifecycle.engines.backend import Row
from lifecycle.engines.base import EngineOptions
from lifecycle.engines.decoder import GRAPH
from lifecycle.engines.ort import OnnxEngine
from lifecycle.graph.blockwise import Blockwise
from lifecycle.graph.export import export_decoder
from lifecycle.graph.int8 import Int8Rowwise
from lifecycle.graph.quantize import Scheme, quantize_graph
from lifecycle.graph.rewrite import GraphRewrite, Linear
from lifecycle.graph.targets import Cpu

REQUESTS, LENGTH = 8, 16
MARK = 3
"""The token that large activations come with."""


class Dynamic(Int8Rowwise):
    """The usual dynamic int8, one scale for all activations of a product; for comparison."""

    def linear(self, rewrite: GraphRewrite, linear: Linear) -> None:
        """Replace one product."""
        values, scales = self.quantize(rewrite.blocks(linear.weight), linear.shape)
        weight = np.ascontiguousarray(values.T)
        stored = rewrite.add(f"{linear.name}.weight.int8", weight, values.size)
        scale = rewrite.add(f"{linear.name}.weight.scale", scales)
        name, node = linear.name, linear.node
        parts = [ir.Value(name=f"{name}.{part}") for part in ("uint8", "step", "zero")]
        quantized = ir.node(
            "DynamicQuantizeLinear", [linear.x], outputs=parts, name=f"{name}.uint8"
        )
        rewrite.graph.insert_before(node, quantized)
        x, step, zero = parts
        g = rewrite.before(node)
        y = g.node("MatMulIntegerToFloat", f"{name}.product", x, stored, step, scale, zero)
        rewrite.replace(linear.node, y)


SCHEMES: dict[str, Scheme | None] = {
    "fp32": None,
    "int8-rowwise, 7 bits": Int8Rowwise(7),
    "int8-rowwise, 8 bits": Int8Rowwise(8),
    "int8, blocks of 64": Blockwise(64, 8),
    "int4, blocks of 64": Blockwise(64, 4),
    "dynamic int8": Dynamic(7),
}


def plant(folder: Path, factor: float) -> None:
    """Scale what every product of a float32 graph reads at the tokens `MARK`."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    graph, helper = model.graph, onnx.helper
    constants = {
        "outlier.mark": np.array([[MARK]], np.int64),
        "outlier.factor": np.array([[factor]], np.float32),
        "outlier.one": np.array([[1]], np.float32),
        "outlier.axis": np.array([1], np.int64),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    before = [
        helper.make_node(
            "Unsqueeze", ["input_ids", "outlier.axis"], ["outlier.ids"], "outlier.ids"
        ),
        helper.make_node("Equal", ["outlier.ids", "outlier.mark"], ["outlier.is"], "outlier.is"),
        helper.make_node(
            "Where",
            ["outlier.is", "outlier.factor", "outlier.one"],
            ["outlier.factors"],
            "outlier.factors",
        ),
    ]
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(before)
    for node in nodes:
        # The head reads rows that were picked; the layers read all.
        if node.op_type == "Gemm" and node.name != "lm_head":
            name = f"{node.name}.planted"
            graph.node.append(
                helper.make_node("Mul", [node.input[0], "outlier.factors"], [name], name)
            )
            node.input[0] = name
        graph.node.append(node)
    onnx.save(model, folder / GRAPH)


def neighbours(folder: Path, first: Iterable[int]) -> NDArray[np.float32]:
    """The logits of all requests but the first one, [requests - 1, tokens, vocab]."""
    engine = OnnxEngine.open(folder, EngineOptions(REQUESTS, 2 * LENGTH))
    rng = np.random.default_rng(0)
    texts = [list(first)]
    texts += [rng.integers(MARK + 1, engine.vocab_size, LENGTH).tolist() for _ in texts * 7]
    logits = engine.forward([Row(i, 0, text, LENGTH) for i, text in enumerate(texts)]).copy()
    engine.close()
    return logits.reshape(REQUESTS, LENGTH, -1)[1:]


def change(folder: Path) -> float:
    """How far an outlier moves its neighbours' logits, as a part of the largest of a token."""
    plain = neighbours(folder, [MARK + 1] * LENGTH)
    moved = neighbours(folder, [MARK] * LENGTH)
    return float((np.abs(moved - plain).max(axis=-1) / np.abs(plain).max(axis=-1)).max())


def measure(checkpoint: Path, factor: float) -> dict[str, float]:
    """By scheme."""
    found: dict[str, float] = {}
    with TemporaryDirectory() as root:
        source = Path(root, "fp32")
        source.mkdir()
        export_decoder(checkpoint, source, Cpu())
        plant(source, factor)
        for name, scheme in SCHEMES.items():
            out = Path(root, "out")
            out.mkdir()
            quantize_graph(source, out, "measured", scheme)
            found[name] = change(out)
            shutil.rmtree(out)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--factor", type=float, default=30.0)
    args = parser.parse_args()
    found = measure(args.checkpoint, args.factor)
    if args.json:
        print(json.dumps({"factor": args.factor, "change": found}))
        return
    for name, value in found.items():
        print(f"{name:24} {value:.2e}")


if __name__ == "__main__":
    main()
