"""A file in memory without reading it: the operating system fetches pages when they are touched."""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import CheckpointError


class MappedFile:
    """A read-only memory map. It is unmapped when it and the last view of it are gone.

    Raises:
        CheckpointError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = path.stat().st_size
                # An empty file cannot be mapped.
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error

    def view(self, start: int, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """The array at byte `start`; the caller has checked that it is inside the file."""
        return np.frombuffer(self.data, dtype, count=math.prod(shape), offset=start).reshape(shape)

    def release(self, start: int, nbytes: int) -> None:
        """Gives back the memory of a part that has been read; views stay valid and would fetch it again."""
        if isinstance(self.data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and nbytes:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, first, start + nbytes - first)
