"""`hidden.onnx`: the graph of a decoder without its output head, over the same weights.

While graphs are built or rewritten, a node stands where hidden states are read. It keeps whatever scales
channels from reaching through to the norm before it, and goes when the graphs are written: `model.onnx`
is the same with and without.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from lifecycle.engines.decoder import HIDDEN_GRAPH, HIDDEN_STATES
from lifecycle.graph.nodes import GraphNodes, save_model

WANTED = "wanted"
"""The node that gathers the normed states of the tokens whose logits are wanted."""


def read_hidden(g: GraphNodes, hidden_size: int) -> None:
    """Let the graph give its hidden states too."""
    node = next(node for node in g.graph if node.name == WANTED)
    states = g.node("Identity", HIDDEN_STATES, node.outputs[0])
    g.output(states, HIDDEN_STATES, ir.DataType.FLOAT, ("L", hidden_size))


def take_hidden(graph: ir.Graph) -> int | None:
    """Undo `read_hidden`; the size of the states, or None if there were none."""
    states = next((value for value in graph.outputs if value.name == HIDDEN_STATES), None)
    if states is None:
        return None
    node, shape = states.producer(), states.shape
    assert node is not None and shape is not None
    graph.outputs.remove(states)
    graph.remove(node, safe=True)
    size = shape[1]
    assert isinstance(size, int)
    return size


def save_hidden(graph: ir.Graph, hidden_size: int, folder: Path, ir_version: int) -> None:
    """Write `hidden.onnx`. `graph` loses its head."""
    wanted = next(node for node in graph if node.name == WANTED).outputs[0]
    logits = next(value for value in graph.outputs if value.name == "logits")
    graph.outputs.remove(logits)
    GraphNodes(graph).output(wanted, HIDDEN_STATES, ir.DataType.FLOAT, ("L", hidden_size))
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    save_model(graph, folder / HIDDEN_GRAPH, ir_version)
