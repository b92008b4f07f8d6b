"""Pages in a file, and marks of its finished rows in another."""

from __future__ import annotations

import errno
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Shaped

from mfac_jax._durable import Claim

# The disk is full, or a quota or the largest size of a file is reached.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def opened(path: Path) -> IO[bytes]:
    """A file to read and write, which is made if it does not exist."""

    def opener(name: str, _: int) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT, 0o644)

    return open(path, "r+b", buffering=0, opener=opener)


class PageFile:
    """An array (p, t, m, w) in an open file, and marks of its finished rows in another.

    Attributes:
        shape: (p, t, m, w).
        dtype: of the array.
        file: the file.
        writes: the number of writes so far.
    """

    def __init__(
        self,
        file: IO[bytes],
        shape: tuple[int, int, int, int],
        dtype: np.dtype,
        marks: IO[bytes] | None = None,
        claim: Claim | None = None,
    ) -> None:
        self.shape, self.dtype, self.writes = shape, np.dtype(dtype), 0
        self.file, self._marks, self._claim = file, marks, claim
        for held in (file, marks):
            if held is not None:
                weakref.finalize(self, held.close)

    def reserve(self) -> None:
        """Makes the file as long as the array, so that a full disk shows before any work.

        Raises:
            ValueError: rows are marked as finished, but the file is shorter.
            OSError: the disk is full.
        """
        size = math.prod(self.shape) * self.dtype.itemsize
        descriptor = self.file.fileno()
        missing = size - os.fstat(descriptor).st_size
        if missing <= 0:
            return
        if self.has_finished(0, self.shape[2]):
            folder = Path(self.file.name).parent
            raise ValueError(
                f"the gradients in {folder} are incomplete: expected {size:,} bytes, got "
                f"{size - missing:,}. Empty the folder."
            )
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.truncate(descriptor, size)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            os.truncate(descriptor, 0)
            free = os.fstatvfs(descriptor)
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: gradients need {size:,} bytes, and "
                f"{free.f_bavail * free.f_frsize:,} are free on the disk",
            ) from error

    def buffer(self) -> Shaped[np.ndarray, "t m w"]:
        """Memory for a page. It starts where JAX on a CPU uses it without a copy."""
        shape = self.shape[1:]
        whole = mmap.mmap(-1, math.prod(shape) * self.dtype.itemsize)
        return np.frombuffer(whole, self.dtype).reshape(shape)

    def read(
        self, page: int, out: Shaped[np.ndarray, "t m w"] | None = None
    ) -> Shaped[np.ndarray, "t m w"]:
        """One page."""
        out = np.empty(self.shape[1:], self.dtype) if out is None else out
        return self._read(out, page * out.size)

    def read_tiles(self, first: int, count: int) -> Shaped[np.ndarray, "k m w"]:
        """Some neighbouring tiles; they are counted over all pages."""
        out = np.empty((count, *self.shape[2:]), self.dtype)
        return self._read(out, first * math.prod(self.shape[2:]))

    def read_rows(self, first: int, count: int) -> Shaped[np.ndarray, "k pt w"]:
        """Some neighbouring rows."""
        _, _, rows, width = self.shape
        starts = [(tile * rows + first) * width for tile in range(self._num_tiles())]
        parts = [self._read(np.empty((count, width), self.dtype), start) for start in starts]
        return np.stack(parts, axis=1)

    def write_page(self, page: int, values: Shaped[np.ndarray, "t m w"]) -> None:
        """Replaces one page."""
        self.writes += 1
        self._write(values, page * math.prod(self.shape[1:]))

    def write_rows(self, first: int, values: Shaped[np.ndarray, "k pt w"]) -> None:
        """Replaces some neighbouring rows. They are marked as finished once the disk has them."""
        _, _, rows, width = self.shape
        self.writes += 1
        self._mark(first, bytes(len(values)))
        for tile in range(self._num_tiles()):
            self._write(values[:, tile], (tile * rows + first) * width)
        if self._marks is not None:
            os.fsync(self.file.fileno())
            self._mark(first, b"\x01" * len(values))

    def num_finished(self) -> int:
        """The number of the first rows that are marked as finished; all without marks."""
        if self._marks is None:
            return self.shape[2]
        marks = os.pread(self._marks.fileno(), self.shape[2], 0)
        return len(marks) - len(marks.lstrip(b"\x01"))

    def _num_tiles(self) -> int:
        """Of all pages."""
        return self.shape[0] * self.shape[1]

    def has_finished(self, first: int, count: int) -> bool:
        """Whether some of these rows are marked as finished; no row is without marks."""
        return self._marks is not None and b"\x01" in os.pread(self._marks.fileno(), count, first)

    def _mark(self, first: int, marks: bytes) -> None:
        if self._marks is not None:
            os.pwrite(self._marks.fileno(), marks, first)

    def _read(self, out: np.ndarray, start: int) -> np.ndarray:
        left = out.reshape(-1).view(np.uint8).data
        place = start * self.dtype.itemsize
        while left:
            count = os.preadv(self.file.fileno(), [left], place)
            if count == 0:
                raise OSError(errno.EIO, "a file of gradients is shorter than it was")
            left, place = left[count:], place + count
        return out

    def _write(self, values: np.ndarray, start: int) -> None:
        flat = np.ascontiguousarray(values, self.dtype).reshape(-1)
        left, place = flat.view(np.uint8).data, start * self.dtype.itemsize
        while left:
            count = os.pwrite(self.file.fileno(), left, place)
            left, place = left[count:], place + count
