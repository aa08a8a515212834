"""Hidden states of graphs that are rewritten."""

from __future__ import annotations

from pathlib import Path

from lifecycle.graph.channels import scalable_channels
from lifecycle.graph.export import export_decoder
from lifecycle.graph.rewrite import GraphRewrite
from lifecycle.graph.targets import Cpu
from tests.graph.models import save_model


def test_no_channel_of_the_states_is_scaled(tmp_path: Path) -> None:
    """The last norm could take a scale that the head makes up for; what else reads it would see it."""
    save_model("llama", tmp_path / "hf")
    scaled: dict[bool, set[str]] = {}
    for hidden_states in (False, True):
        folder = tmp_path / str(hidden_states)
        folder.mkdir()
        export_decoder(tmp_path / "hf", folder, Cpu(), hidden_states=hidden_states)
        channels = scalable_channels(GraphRewrite(folder))
        scaled[hidden_states] = {reader.name for found in channels for reader in found.readers}
    assert scaled[False] - scaled[True] == {"lm_head"}
    assert scaled[True] < scaled[False]
