"""Weights in the form that this machine's kernels want them in, kept in a folder and mapped from it.

ONNX Runtime rearranges weights when it opens a graph, into memory of each session. Saved once, the result
is mapped from its file: opening takes less time, and what processes and the graphs of one model have in
common is in memory once.
"""

# onnxruntime ships no type information; what comes from it is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import logging
import os
import platform
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lifecycle.engines.heap import trim_heap
from lifecycle.engines.onnx_file import (
    Entries,
    change_external_tensors,
    check_external_data,
    external_tensors,
)
from lifecycle.errors import EngineError

log = logging.getLogger(__name__)

PROVIDERS = ("CPUExecutionProvider",)
"""The providers that have such weights."""
_PREPACKED = "prepacked_"
"""What the keys begin with under which ONNX Runtime says where they are."""
_PIECE = 1 << 24
_SMALL = "1024"
"""Bytes of a tensor that is left in the graph."""

Region = tuple[int, int]
"""The first byte, and how many."""


def open_packed(graph: Path, folder: Path, make_options: Callable[[], Any]) -> ort.InferenceSession:
    """Open a graph on the CPU with weights from `folder`, which are made when they are missing. Where
    that fails, it is opened without: the log says why.

    Args:
        make_options: gives `SessionOptions` of its own to each session.

    Raises:
        EngineError: anyone on this machine may write to `folder`: what is in it is run.
    """
    _check_owner(folder)
    try:
        return _open(graph, folder, make_options)
    except EngineError as error:
        log.warning("%s is opened without packed weights from %s: %s", graph, folder, error)
    return ort.InferenceSession(graph, make_options(), providers=list(PROVIDERS))


def _open(graph: Path, folder: Path, make_options: Callable[[], Any]) -> ort.InferenceSession:
    try:
        kept = _place(graph, folder)
        if not _is_whole(kept):
            log.info("preparing the weights of %s in %s", graph, folder)
            _make(graph, kept, make_options())
            trim_heap()
            if not _is_whole(kept):
                raise EngineError(f"{kept.parent} could not be written")
        options = make_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(kept, options, providers=list(PROVIDERS))
    except Exception as error:
        raise EngineError(str(error)) from error


def _check_owner(folder: Path) -> None:
    try:
        mode = folder.stat().st_mode
    except OSError:
        return
    if mode & stat.S_IWOTH:
        raise EngineError(
            f"anyone may write to the folder of packed weights {folder}, and what is in it is run: "
            f"take that right away (chmod o-w {folder}), or name another folder"
        )


def _place(graph: Path, folder: Path) -> Path:
    """Where the packed form of a graph is kept. It is another one for other weights, another processor
    and another ONNX Runtime."""
    model = graph.parent.resolve()
    state = hashlib.sha256(f"{ort.__version__}\0{_processor()}".encode())
    owner = hashlib.sha256(os.fsencode(model))
    for name in check_external_data(graph):
        found = (model / name).stat()
        state.update(f"\0{name}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ino}".encode())
        owner.update(f"\0{name}".encode())
    content = hashlib.sha256(graph.read_bytes()).hexdigest()[:16]
    entry = f"{owner.hexdigest()[:16]}-{state.hexdigest()[:16]}"
    return folder / entry / f"{graph.stem}-{content}.onnx"


def _processor() -> str:
    """What kernels are chosen by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _make(graph: Path, kept: Path, options: Any) -> None:
    """Save the packed form of a graph, as a whole or not at all."""
    entry = kept.parent
    entry.mkdir(parents=True, exist_ok=True)
    for other in entry.parent.glob(f"{entry.name.partition('-')[0]}-*"):
        # Of the same weights, before it or the machine changed. Who has mapped it keeps it.
        if other != entry:
            shutil.rmtree(other, ignore_errors=True)
    for part in (kept, *entry.glob(f"{kept.stem}-*.data")):
        part.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=entry) as scratch:
        made = Path(scratch) / kept.name
        data = made.with_name(f"{kept.stem}-{secrets.token_hex(4)}.data")
        options.optimized_model_filepath = str(made)
        for name, value in (
            ("session.optimized_model_external_initializers_file_name", data.name),
            ("session.optimized_model_external_initializers_min_size_in_bytes", _SMALL),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(name, value)
        ort.InferenceSession(graph, options, providers=list(PROVIDERS))
        _share(made, data, sorted(entry.glob("*.onnx")))
        if data.exists():
            data.rename(entry / data.name)
        try:
            os.link(made, kept)
        except FileExistsError:
            # Another process was quicker.
            (entry / data.name).unlink(missing_ok=True)
        except OSError:
            made.rename(kept)


def _share(graph: Path, data: Path, others: Sequence[Path]) -> None:
    """Take from the files of other graphs what is there already; `data` keeps the rest."""
    there: dict[str, Entries] = {}
    for other in others:
        there |= external_tensors(other.read_bytes())
    files: dict[str, NDArray[np.uint8]] = {}

    def bytes_of(entries: Entries, folder: Path) -> Iterator[NDArray[np.uint8]]:
        name = entries["location"]
        if name not in files:
            files[name] = np.memmap(folder / name, np.uint8, "r")
        for start, size in _regions(entries):
            yield files[name][start : start + size]

    kept: list[Region] = []

    def place(name: str, entries: Entries) -> Entries | None:
        found = there.get(name)
        if found is not None and found.keys() == entries.keys():
            pairs = zip(
                bytes_of(entries, graph.parent), bytes_of(found, others[0].parent), strict=True
            )
            if all(np.array_equal(*pair) for pair in pairs):
                return found
        kept.extend(_regions(entries))
        return None

    graph.write_bytes(change_external_tensors(graph.read_bytes(), place))
    if there:
        _keep(data, kept)


def _regions(entries: Entries) -> list[Region]:
    """The parts of its file that a tensor takes: its own bytes, and each packed form of them."""
    found = [(int(entries["offset"]), int(entries["length"]))]
    for key, value in entries.items():
        if key.startswith(_PREPACKED):
            # Kernel and digest, then a group for each buffer: offset;length;another digest.
            for group in value.split("|")[1:]:
                start, size, *_ = group.split(";")
                found.append((int(start), int(size)))
    return found


def _keep(data: Path, regions: Sequence[Region]) -> None:
    """Let a file take room for some of its parts only; they stay where they are in it."""
    if not regions:
        data.unlink()
        return
    smaller = data.with_suffix(".smaller")
    with data.open("rb") as source, smaller.open("wb") as target:
        target.truncate(data.stat().st_size)
        for start, size in regions:
            source.seek(start)
            target.seek(start)
            while size > 0:
                piece = source.read(min(size, _PIECE))
                if not piece:
                    raise EOFError(f"{data} is shorter than its graph says")
                target.write(piece)
                size -= len(piece)
    smaller.replace(data)


def _is_whole(graph: Path) -> bool:
    """Whether a graph and all that it takes from other files is there. Reading beyond the end of a mapped
    file would kill the process."""
    try:
        check_external_data(graph)
        for entries in external_tensors(graph.read_bytes()).values():
            size = (graph.parent / entries["location"]).stat().st_size
            if any(start + count > size for start, count in _regions(entries)):
                return False
    except (EngineError, OSError, ValueError, IndexError, KeyError):
        return False
    return True
