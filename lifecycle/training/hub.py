"""Model folders from the Hugging Face hub, pinned to a commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from lifecycle.errors import CheckpointError
from lifecycle.pipeline.store import NO_SPACE
from lifecycle.training.checkpoint import PATTERNS


def download(repo: str, revision: str, folder: Path) -> None:
    """Fetch the files that a checkpoint is made of; a second call goes on with the first's.

    A token is taken from where the hub's own tools keep it, never from the recipe.

    Raises:
        CheckpointError: the hub cannot be reached, or refuses.
    """
    disable_progress_bars()
    try:
        snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=list(PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot fetch {repo} at {revision}: {reason} (without network, fetch it elsewhere "
            "and give its folder as 'path'; for a gated model, log in with 'hf auth login')"
        ) from error
