"""The model card of a bundle: `README.md`, written from its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

_DIGITS = 12
"""Hexadecimal digits of a digest that a reader gets to see; the manifest has them all."""


def model_card(manifest: Record) -> str:
    """Markdown: what the model is, what was measured, how to serve it, how it was made."""
    is_decoder = "architecture" in manifest["model"]
    sections = [
        _summary(manifest) if is_decoder else _graph_summary(manifest),
        _measured(manifest["report"]),
        _SERVING if is_decoder else _RUNNING,
        _lineage(manifest["lineage"]),
        _LICENCE,
    ]
    return "\n\n".join(sections) + "\n"


def _summary(manifest: Record) -> str:
    model = manifest["model"]
    return (
        f"# {manifest['name']}\n\n"
        f"A `{model['architecture']}` decoder with {model['scheme']} weights, a vocabulary of "
        f"{model['vocab_size']:,} tokens and a context of {model['context_length']:,}, as an ONNX "
        f"graph for the target `{model['target']}`. Made with lifecycle-toolkit; "
        f"`manifest.json` lists every file with its SHA-256.\n\n"
        f"Model digest: `{model['digest']}`"
    )


def _graph_summary(manifest: Record) -> str:
    model = manifest["model"]
    ports = [
        [kind[:-1], port["name"], port["dtype"], _shape(port["shape"])]
        for kind in ("inputs", "outputs")
        for port in model[kind]
    ]
    weights = ", ".join(f"{count:,} in {name}" for name, count in model["precisions"].items())
    return (
        f"# {manifest['name']}\n\n"
        f"An ONNX graph with {model['parameters']:,} parameters in its matrices"
        f"{f' ({weights})' if weights else ''}. Made with lifecycle-toolkit; `manifest.json` lists "
        f"every file with its SHA-256.\n\n"
        f"Model digest: `{model['digest']}`\n\n"
        f"## Inputs and outputs\n\n{_table(['', 'name', 'type', 'shape'], ports)}"
    )


def _shape(shape: list[int | str] | None) -> str:
    return "" if shape is None else f"[{', '.join(map(str, shape))}]"


def _measured(report: Record | None) -> str:
    if report is None:
        return "## Measured\n\nNothing: this bundle is **ungated**, it was made without a report."
    reference = (report["reference"] or {}).get("metrics", {})
    bounds = {gate["metric"]: gate["bound"] for gate in report["gates"]}
    rows = [
        [name, f"{value:g}", f"{reference[name]:g}" if name in reference else "", bounds.get(name)]
        for name, value in report["metrics"].items()
    ]
    verdict = "Every gate passed." if bounds else "No metric was held to a bound: **ungated**."
    data = report["data"]
    counts = ", ".join(f"{count:,} {name}" for name, count in _nonzero(report["counts"]).items())
    about = f"On the {data['split']} split of `{data['digest'][:_DIGITS]}` ({counts}). {verdict}"
    return "\n\n".join(
        ["## Measured", about, _table(["metric", "this model", "its reference", "gate"], rows)]
    )


def _lineage(lineage: list[Record]) -> str:
    # An artifact that no recipe made has neither a stage nor settings.
    rows = [
        [
            record.get("use", record["kind"]),
            f"`{record['digest'][:_DIGITS]}`",
            _pairs({name: digest[:_DIGITS] for name, digest in record.get("inputs", {}).items()}),
            _pairs(record.get("settings", {})),
        ]
        for record in lineage
    ]
    about = (
        "Each line is a stage, the oldest first; inputs are named by the digests of lines above."
    )
    return "\n\n".join(
        ["## How it was made", about, _table(["stage", "digest", "inputs", "settings"], rows)]
    )


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _pairs(values: Record) -> str:
    return ", ".join(
        f"{name} `{_spelled(value)}`" for name, value in values.items() if value is not None
    )


def _spelled(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name.replace("_", " "): count for name, count in counts.items() if count}


_SERVING = """## Serve

```sh
pip install 'lifecycle-toolkit[serve]'
lifecycle serve FOLDER
```

`FOLDER` is the folder of this file. The API is OpenAI's."""

_RUNNING = """## Run

```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
outputs = session.run(None, inputs)
```

`FOLDER` is the folder of this file; `inputs` holds an array for each input by its name.
`lifecycle serve` takes decoders only."""

_LICENCE = """## Licence

The weights are under the terms of what they were made from: the base model and the training
data named above. The toolkit adds none."""
