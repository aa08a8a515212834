"""Every error that `lifecycle` raises on purpose. Each names what is wrong and the way out.

`exit_code` is what the command line returns for it: 1 for work that failed, 2 for a
recipe or an argument that cannot work, 130 for an interruption.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_EXTRA_OF = {
    "torch": "train",
    "transformers": "train",
    "peft": "train",
    "accelerate": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "fastapi": "serve",
    "uvicorn": "serve",
    "llguidance": "serve",
    "pyarrow": "data",
    "huggingface_hub": "train",
}
"""Which extra of this distribution brings a module."""


class LifecycleError(Exception):
    """Base of all errors raised on purpose; `str()` of it is fit to be shown to a user."""

    exit_code = 1


class RecipeError(LifecycleError):
    """A recipe, an override or an argument that cannot work; nothing has been run."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        where: str = "",
    ) -> None:
        self.message, self.file, self.line, self.where = message, file, line, where
        place = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (place, where, message) if part))


class PluginError(LifecycleError):
    """A plug-in that does not exist, cannot be imported or is not what its group asks for."""

    exit_code = 2


class MissingExtraError(LifecycleError):
    """An optional part that is not installed; names the command that installs it."""

    exit_code = 2

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed; "
            f"install them with: pip install 'lifecycle-toolkit[{extra}]'"
        )

    @classmethod
    def explain(cls, what: str, error: ModuleNotFoundError) -> MissingExtraError | None:
        """The error for a failed import, if the module belongs to one of our extras."""
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        return None if extra is None else cls(what, extra)


class DataError(LifecycleError):
    """Input data that cannot be used; names the file, the line and the way out."""


class CheckpointError(LifecycleError):
    """A model folder that cannot be used: missing, incomplete, unsafe or of an unknown kind."""


class UnsupportedArchitectureError(CheckpointError):
    """A model whose architecture the graph builder does not know; lists those it knows."""


class StageError(LifecycleError):
    """A stage that cannot do what its settings ask of its inputs."""


class GateError(LifecycleError):
    """An evaluation whose measured value is outside its bound; `metrics` holds all it measured."""

    def __init__(self, message: str, metrics: dict[str, Any] | None = None) -> None:
        self.metrics = metrics or {}
        super().__init__(message)


class StoreError(LifecycleError):
    """A store that cannot be used: newer format, no permission, no space."""


class CorruptArtifactError(StoreError):
    """An artifact whose files are not the ones that were recorded; names the first such file."""


class EngineError(LifecycleError):
    """An inference engine that cannot be opened, or that failed while it generated."""


class RequestError(EngineError):
    """A generation request that can never be served; the engine goes on without it."""


class InterruptedRun(LifecycleError):
    """The run was interrupted by the user or the system; finished stages are kept."""

    exit_code = 130
