"""Small ONNX graphs as users bring them, with PyTorch's word for what they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float32]
Weights = dict[str, Floats]


def encoder_weights() -> Weights:
    """A table and products in all the forms that exporters write them in."""
    random = np.random.default_rng(0)
    shapes = {"table": (1024, 64), "w1": (64, 96), "b1": (96,), "w2": (48, 96), "w3": (48, 32)}
    return {k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def write_encoder(path: Path, weights: Weights) -> Path:
    """Tokens [batch, sequence] to floats [batch, sequence, 32]; weights in a file beside it."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "tokens"),
        helper.make_node("MatMul", ["x", "w1"], ["h"], "up"),
        helper.make_node("Add", ["h", "b1"], ["biased"], "bias"),
        helper.make_node("Relu", ["biased"], ["act"], "relu"),
        helper.make_node("Transpose", ["w2"], ["w2t"], "turned", perm=[1, 0]),
        helper.make_node("MatMul", ["act", "w2t"], ["low"], "down"),
        helper.make_node("MatMul", ["low", "w3"], ["out"], "head"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "sequence", 32])
    return _write(path, nodes, [ids], [out], weights, opset=20, external=True)


def run_encoder(weights: Weights, ids: NDArray[np.int64]) -> Floats:
    w = {name: torch.from_numpy(values) for name, values in weights.items()}
    x = torch.relu(w["table"][torch.from_numpy(ids)] @ w["w1"] + w["b1"])
    return (x @ w["w2"].T @ w["w3"]).numpy()


def classifier_weights() -> Weights:
    random = np.random.default_rng(1)
    shapes = {
        "k1": (8, 3, 3, 3),
        "c1": (8,),
        "k2": (8, 8, 3, 3),
        "c2": (8,),
        "head": (8, 5),
        "bias": (5,),
    }
    found = {k: random.standard_normal(s).astype(np.float32) / 3 for k, s in shapes.items()}
    # Channels of very different sizes, which one scale for all of them would ruin; the head makes
    # them count alike.
    sizes = np.geomspace(0.1, 1, 8, dtype=np.float32)
    found["k2"] *= sizes[:, None, None, None]
    found["head"] /= sizes[:, None]
    return found


def write_classifier(path: Path, weights: Weights, opset: int = 20) -> Path:
    """Images [batch, 3, 12, 12] to scores [batch, 5], all in one file."""
    same = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Conv", ["image", "k1", "c1"], ["a"], "conv1", **same),
        helper.make_node("Relu", ["a"], ["ar"], "relu1"),
        helper.make_node("MaxPool", ["ar"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p", "k2", "c2"], ["b"], "conv2", **same),
        helper.make_node("Add", ["p", "b"], ["s"], "residual"),
        helper.make_node("Relu", ["s"], ["sr"], "relu2"),
        helper.make_node("GlobalAveragePool", ["sr"], ["g"], "average"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "head", "bias"], ["scores"], "scores"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 12, 12])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5])
    return _write(path, nodes, [image], [scores], weights, opset, external=False)


def run_classifier(weights: Weights, images: Floats) -> Floats:
    w = {name: torch.from_numpy(values) for name, values in weights.items()}
    x = torch.relu(torch.conv2d(torch.from_numpy(images), w["k1"], w["c1"], padding=1))
    x = torch.max_pool2d(x, 2)
    x = torch.relu(x + torch.conv2d(x, w["k2"], w["c2"], padding=1))
    return (x.mean((2, 3)) @ w["head"] + w["bias"]).numpy()


def _write(path, nodes, inputs, outputs, weights: Weights, opset: int, external: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "users", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(
        model, path, save_as_external_data=external, location=f"{path.stem}.bin", size_threshold=0
    )
    return path
