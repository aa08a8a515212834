"""The model card of a bundle: `README.md`, written from its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]

_DIGITS = 12
"""Hexadecimal digits of a digest that a reader gets to see; the manifest has them all."""


def model_card(manifest: Record) -> str:
    """Markdown: what the model is, what was measured, how to serve it, how it was made."""
    sections = [
        _summary(manifest),
        _measured(manifest["report"]),
        _SERVING,
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
    short = {record["digest"]: record["digest"][:_DIGITS] for record in lineage}
    rows = [
        [
            record.get("use", record["kind"]),
            f"`{short[record['digest']]}`",
            _pairs({field: short.get(digest, digest) for field, digest in _of(record, "inputs")}),
            _pairs(dict(_of(record, "settings"))),
        ]
        for record in lineage
    ]
    about = "Each line is a stage, the oldest first; the inputs are the digests of earlier lines."
    return "\n\n".join(
        ["## How it was made", about, _table(["stage", "digest", "inputs", "settings"], rows)]
    )


def _of(record: Record, field: str) -> Iterable[tuple[str, Any]]:
    """The pairs of a record's field; an artifact made outside any recipe has none."""
    values: Mapping[str, Any] = record.get(field, {})
    return values.items()


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _pairs(values: Record) -> str:
    return ", ".join(f"{name} `{value}`" for name, value in values.items())


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name.replace("_", " "): count for name, count in counts.items() if count}


_SERVING = """## Serve

```sh
pip install 'lifecycle-toolkit[serve]'
lifecycle serve FOLDER
```

`FOLDER` is the folder of this file. The API is OpenAI's."""

_LICENCE = """## Licence

The weights are under the terms of what they were made from: the base model and the training
data named above. The toolkit adds none."""
