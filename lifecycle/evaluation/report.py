"""`report.json`: what was measured, on which model and data, and every gate's verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lifecycle.evaluation.findings import Answer, Findings
from lifecycle.evaluation.gates import Verdict
from lifecycle.pipeline.artifact import Artifact

FILE = "report.json"
FORMAT = 1

_SHOWN_ANSWERS = 5
_SHOWN_CHARACTERS = 500


def write_report(
    folder: Path,
    found: Findings,
    verdicts: Sequence[Verdict],
    *,
    models: Sequence[Artifact],
    data: Artifact,
    split: str,
) -> None:
    """Write `report.json` on the first of `models`, whose reference is the second, if any.

    Artifacts are named by kind and digest, not by what a recipe calls them: a recipe may rename
    them while the report stays true.
    """
    model, *references = (_named(artifact) for artifact in models)
    reference = {**references[0], "metrics": found.reference_metrics} if references else None
    content = {
        "format": FORMAT,
        "model": model,
        "reference": reference,
        "data": {**_named(data), "split": split},
        "counts": found.counts,
        "metrics": found.metrics,
        "gates": [asdict(verdict) for verdict in verdicts],
        "samples": [_shown(answer) for answer in found.answers[:_SHOWN_ANSWERS]],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def _named(artifact: Artifact) -> dict[str, str]:
    return {"kind": artifact.kind, "digest": artifact.digest}


def _shown(answer: Answer) -> dict[str, str]:
    return {name: text[:_SHOWN_CHARACTERS] for name, text in asdict(answer).items()}
