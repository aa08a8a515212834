"""Other tools to measure against: each in an environment of its own, spoken to in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent


def cache_dir() -> Path:
    """Where environments and models for benchmarks are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lifecycle-toolkit" / "benchmarks"


def environment(
    name: str, requirements: Sequence[str], build: Mapping[str, str] | None = None
) -> Path:
    """The Python of a virtual environment with `requirements`, made on the first call.

    What it does not bring itself (torch, transformers) it finds in this environment. `build` are
    variables for requirements that are compiled.
    """
    folder = cache_dir() / "environments" / name
    python = folder / "bin" / "python"
    done = folder / "requirements.json"
    if done.is_file() and json.loads(done.read_text()) == list(requirements):
        return python
    venv.create(folder, clear=True, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    variables = os.environ | dict(build or {})
    subprocess.run([*install, *requirements], check=True, stdout=sys.stderr, env=variables)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    # A .pth comes after the environment's own packages, so those win.
    (packages / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done.write_text(json.dumps(list(requirements)))
    return python


class Worker:
    """A peer's process: one JSON object per line in, one per line out."""

    def __init__(self, python: Path, script: str, *arguments: str) -> None:
        # -P: a measurement beside the script may be called as the peer's package.
        self._process = subprocess.Popen(
            [str(python), "-P", str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer ended with code {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
