"""Arrays that would be most of the memory, kept in files instead."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


def mapped(
    blocks: Iterable[NDArray[T]], shape: tuple[int, ...], dtype: np.dtype[T], folder: Path | None
) -> NDArray[T]:
    """An array of `shape` whose values come in order, in blocks, to be read only. They lie in a file without a name in
    `folder`, by default where the system keeps such files, which is gone with the array.

    Raises:
        OSError: the disk is full.
    """
    # Written, then mapped: where there is no room, writing through a map ends the process.
    with TemporaryFile(dir=folder) as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
        file.flush()
        try:
            return np.memmap(file, dtype, "r", shape=shape)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            # Each keeps its file open. With so many texts that there are no more, they are in memory.
            found = np.empty(shape, dtype)
            file.seek(0)
            file.readinto(found.reshape(-1).view(np.uint8).data)
            return found
