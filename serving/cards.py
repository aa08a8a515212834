"""What is served, as the API shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lifecycle.bundle.manifest import MANIFEST, verify_bundle
from lifecycle.engines.peft import CONFIG, WEIGHTS
from lifecycle.pipeline.artifact import hash_file
from lifecycle.pipeline.files import sha256


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model, or an adapter of it."""

    name: str
    gated: bool
    """Whether the model has passed the gates of an evaluation."""
    fingerprint: str | None
    """Changes whenever the model does; None for a folder that is no bundle."""
    created: int
    """Unix time, in seconds, since when it is served."""
    parent: str | None = None
    """The name of the model that this is an adapter of."""


def model_card(path: Path, name: str | None) -> ModelCard:
    """The card of a model folder; `name` None takes the bundle's name or the folder's."""
    created = int(time.time())
    if not (path / MANIFEST).is_file():
        return ModelCard(name or path.resolve().name, False, None, created)
    manifest = verify_bundle(path)
    digest = str(manifest["digest"])
    shown = name or manifest.get("name") or path.resolve().name
    return ModelCard(str(shown), bool(manifest.get("gated")), f"fp_{digest[:12]}", created)


def adapter_card(base: ModelCard, name: str, folder: Path) -> ModelCard:
    """The card of an adapter in a PEFT folder."""
    # Both files: another lora_alpha is another model.
    hashes = "".join(hash_file(folder / file) for file in (CONFIG, WEIGHTS))
    print_of = None
    if base.fingerprint is not None:
        print_of = f"{base.fingerprint}_{sha256(hashes.encode())[:12]}"
    # What gates have passed is the model without it.
    return ModelCard(name, False, print_of, int(time.time()), base.name)
