"""The guide to extending, followed to the letter from a folder outside the project."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from lifecycle.evaluation.parity import measure_parity
from tests.docs.blocks import ROOT, blocks


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The guide's package, laid out as pip leaves an installed one."""
    toml, python, yaml = blocks(ROOT / "docs" / "extending.md")
    assert (toml.language, python.language, yaml.language) == ("toml", "python", "yaml")
    root = tmp_path_factory.mktemp("outside")
    (root / "lifecycle_extras.py").write_text(python.text)
    (root / "recipe.yaml").write_text(yaml.text)
    project = tomllib.loads(toml.text)["project"]
    info = root / f"lifecycle_extras-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    entries = configparser.ConfigParser()
    entries.read_dict(project["entry-points"])
    with (info / "entry_points.txt").open("w") as file:
        entries.write(file)
    return root


def lifecycle(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lifecycle.cli", *args],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_recipe_runs_with_all_three_plug_ins(package: Path) -> None:
    done = lifecycle(package, "run", "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert stages["short"]["metrics"]["train"] > 0
    adapter = Path(stages["tuned"]["path"], "adapter", "adapter_config.json")
    assert json.loads(adapter.read_text())["target_modules"] in (
        ["q_proj", "v_proj"],
        ["v_proj", "q_proj"],
    )
    decoder = Path(stages["onnx"]["path"], "decoder.json")
    assert json.loads(decoder.read_text())["target"] == "small-cpu"


def test_the_architecture_gives_the_logits_of_pytorch(package: Path) -> None:
    config = GemmaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(package / "gemma")
    (package / "gemma" / "onnx").mkdir()
    script = (
        "from pathlib import Path; from lifecycle.graph.export import export_decoder; "
        "from lifecycle.graph.targets import Cpu; "
        "export_decoder(Path('gemma'), Path('gemma/onnx'), Cpu())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=package,
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    ways = measure_parity(package / "gemma", package / "gemma" / "onnx")
    assert ways.keys() == {"prefill", "chunks", "ragged", "rollback"}
    assert max(ways.values()) < 1e-4


def test_the_plug_ins_are_listed_and_described(package: Path) -> None:
    assert "Keep the conversations" in lifecycle(package, "stages").stdout
    assert "Longest message that is kept" in lifecycle(package, "stages", "shorten").stdout


def test_a_target_refuses_what_it_does_not_run(package: Path) -> None:
    (package / "bad.yaml").write_text(
        "stages:\n"
        "  base: {use: checkpoint, path: .}\n"
        "  onnx: {use: export, model: base, target: smal-cpu}\n"
    )
    done = lifecycle(package, "run", "bad.yaml")
    assert done.returncode == 2
    assert "unknown target 'smal-cpu'; did you mean 'small-cpu'" in done.stderr
