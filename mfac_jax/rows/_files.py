"""Rows in files, which the host reads page by page."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax import _checks, kernels
from mfac_jax._durable import Claim, check_system, claim, make_folder
from mfac_jax._layout import Layout, PyTree
from mfac_jax.kernels._xla import accumulation_dtype
from mfac_jax.rows._base import GradientRows, is_small_enough
from mfac_jax.rows._page_file import NO_ROOM, PageFile, opened
from mfac_jax.rows._pages import OfPage, PageRows, are_alike, held_pages, page_shape, scan_bytes
from mfac_jax.rows._storage import Storage, check_dtype, dtype_for

# Of the files; a change of what they hold raises it.
_VERSION = 2
_PAGES, _FINISHED, _MANIFEST = "gradients", "finished", "manifest.json"


@dataclass(frozen=True)
class Files(Storage):
    """Stores gradients in files; for a scan, the memory of the host holds two pages of them.

    It is for gradients that no memory holds. The rows work outside of ``jit``: for
    :func:`mfac_jax.collect_gradients`, :func:`mfac_jax.fisher_inverse` and
    :func:`mfac_jax.pruning.prune`. Each scan reads the files once, and the next page is read while
    the device works on the present one. ``W`` of a whitened inverse is another such file.

    :func:`mfac_jax.collect_gradients` names its files. The same call goes on after an
    interruption: rows that were finished are not computed again. Other files have no name, and the
    operating system removes them with the process.

    Writing many rows at once changes the files in place; afterwards only the returned rows can be
    read. Other changes copy the files, and so does writing over finished rows of named files.

    Attributes:
        directory: the folder of the files, which is made if it does not exist.
        columns: the number of columns of a page, rounded up to whole tiles of at most 8,192; by
            default a page takes 64 MiB.
        dtype: the dtype of stored gradients: float32, bfloat16 or float64. By default it is
            float64 if a parameter is float64, and otherwise float32.

    Raises:
        TypeError: an attribute has another type.
        ValueError: ``directory`` is empty, ``columns`` is below 1, or ``dtype`` is another dtype.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from mfac_jax import fisher_inverse, rows
        >>> held = rows.as_rows(jnp.eye(3), storage=rows.Files(tempfile.mkdtemp()))
        >>> fisher_inverse(held, damping=1.0).ihvp(jnp.ones(3))
        Array([0.75, 0.75, 0.75], dtype=float32)
    """

    directory: str | os.PathLike[str]
    columns: int | None = None
    dtype: DTypeLike | None = None
    is_traceable = False
    keeps_gradients = True

    def __post_init__(self) -> None:
        _checks.folder(self.directory, "directory")
        if self.columns is not None:
            _checks.positive_int(self.columns, "columns")
        object.__setattr__(self, "dtype", check_dtype(self.dtype))

    def empty(self, params: PyTree, num_rows: int) -> FileRows:
        """See :meth:`Storage.empty`. The files have no name.

        Raises:
            ValueError: a page has more columns than the gradients.
            OSError: the folder cannot be written, or the disk is full.
        """
        m, layout = _checks.positive_int(num_rows, "num_rows"), Layout(params)
        return self._rows(self.temporary(), layout, m)

    def bytes_by_place(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.bytes_by_place`."""
        layout = Layout(params)
        shape = self._shape(layout, num_rows)
        return {"disk": math.prod(shape) * dtype_for(layout, self.dtype).itemsize}

    def scan_bytes(self, params: PyTree, num_rows: int, platform: str) -> dict[str, int]:
        """See :meth:`Storage.scan_bytes`. The host has the pages that are read."""
        layout = Layout(params)
        shape = self._shape(layout, num_rows)
        buffers = held_pages(shape) * dtype_for(layout, self.dtype).itemsize
        scan = scan_bytes(shape, layout.dtype.itemsize, platform)
        # A CPU reads a tile where its page is.
        return {"device": scan // 2 if platform == "cpu" else scan, "host": buffers}

    def whitened_bytes(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.whitened_bytes`. They are another file."""
        layout = Layout(params)
        return {"disk": math.prod(self._shape(layout, num_rows)) * layout.dtype.itemsize}

    def resume(
        self, params: PyTree, num_rows: int, origin: Callable[[], Mapping[str, str]]
    ) -> tuple[FileRows, int]:
        """See :meth:`Storage.resume`. The files keep their names.

        Raises:
            ValueError: the folder holds something else, or gradients of other parameters,
                another number or another origin.
            OSError: the folder cannot be written, or the disk is full.
        """
        m, layout = _checks.positive_int(num_rows, "num_rows"), Layout(params)
        folder, shape = Path(self.directory), self._shape(layout, m)
        manifest = {
            "version": _VERSION,
            "parameters": layout.describe(),
            "rows": m,
            "tiles": shape[1],
            "columns": shape[3],
            "dtype": dtype_for(layout, self.dtype).name,
            **origin(),
        }
        claimed = claim(folder, _MANIFEST, manifest)
        finished = folder / _FINISHED
        marks = opened(finished)
        if os.fstat(marks.fileno()).st_size < m:  # new, or killed before anything was written
            os.truncate(marks.fileno(), m)
        pages = opened(folder / _PAGES)
        try:
            rows = self._rows(pages, layout, m, marks, claimed)
        except OSError as error:
            if error.errno in NO_ROOM:  # nothing is in the files yet; a smaller number may fit
                for name in (_PAGES, _FINISHED, _MANIFEST):
                    (folder / name).unlink()
            raise
        return rows, rows.num_finished

    def _rows(
        self,
        file: IO[bytes],
        layout: Layout,
        num_rows: int,
        marks: IO[bytes] | None = None,
        claimed: Claim | None = None,
    ) -> FileRows:
        shape = self._shape(layout, num_rows)
        pages = PageFile(file, shape, dtype_for(layout, self.dtype), marks, claimed)
        pages.reserve()
        return FileRows(pages, layout, num_rows, self, pages.writes)

    def _shape(self, layout: Layout, num_rows: int) -> tuple[int, int, int, int]:
        column_bytes = num_rows * dtype_for(layout, self.dtype).itemsize
        count, tiles, width = page_shape(self.columns, layout.size, column_bytes)
        return count, tiles, num_rows, width

    def temporary(self) -> IO[bytes]:
        """A new file in the folder that no other process sees and nothing is left of."""
        # The file outlives this function; it closes with the rows.
        check_system()
        folder = Path(self.directory)
        make_folder(folder)
        return tempfile.TemporaryFile(dir=folder, buffering=0)


# Compared by identity: the files change.
@dataclass(frozen=True, eq=False)
class FileRows(PageRows):
    """Gradients in files, as pages of columns. ``jit`` cannot trace them.

    Attributes:
        pages: the open files.
        layout: the parameters that the gradients belong to.
        num_rows: ``m``.
        storage: the storage.
        writes: the number of writes that the rows have seen. After another one, they cannot be
            read any more.
    """

    pages: PageFile
    layout: Layout
    num_rows: int
    storage: Files
    writes: int

    @property
    def is_traceable(self) -> bool:
        return False

    @property
    def num_finished(self) -> int:
        """The number of the first rows that were written whole."""
        return self.pages.num_finished()

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[FileRows, Float[Array, " m"], Bool[Array, ""]]:
        rows, accepted = self.write(row, gradient)
        stored = self.layout.flatten(gradient, self.pages.dtype, "gradient").astype(self.dtype)
        return rows, rows._dots(stored), accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[FileRows, Bool[Array, ""]]:
        self.layout.check(gradient, "gradient")
        stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], gradient)
        rows, accepted = self._copy().write_rows(row, stacked, 1)
        return rows, accepted[0]

    def write_rows(
        self, first: int | Int[Array, ""], gradients: PyTree, count: int | Int[Array, ""]
    ) -> tuple[FileRows, Bool[Array, " k"]]:
        leaves = self.layout.leaves(gradients, "gradients")
        stored, accepted = _flat(leaves, num_rows=self.num_rows, dtype=self.pages.dtype)
        values, good = np.asarray(stored)[: int(count)], np.asarray(accepted)[: int(count)]
        self._check_unchanged()
        if not 0 <= int(first) <= self.num_rows - len(values):
            raise ValueError(
                f"the rows must lie in 0 to {self.num_rows - 1}, got {len(values)} from "
                f"{int(first)} on."
            )
        # Finished rows of named files are those of a run, which another call goes on with.
        is_kept = self.pages.has_finished(int(first), len(values))
        rows = self._copy() if is_kept else self
        for start, stop in _runs(good):
            cut = rows._cut_all(values[start:stop])
            rows.pages.write_rows(int(first) + start, cut)
        return rows._now(), accepted

    def clear(self, row: Int[Array, ""]) -> FileRows:
        out = self._copy().pages
        if int(row) < self.num_rows:
            count, tiles, _, width = out.shape
            out.write_rows(int(row), np.zeros((1, count * tiles, width), out.dtype))
        return replace(self, pages=out, writes=out.writes)

    def restrict(self, mask: PyTree) -> FileRows:
        keep = np.asarray(self._cut(self.layout.flat_mask(mask)))
        return self._map(lambda i, page: np.where(keep[i][:, None], page, np.zeros_like(page)))

    def gradients(self, first: int, count: int) -> PyTree:
        """Some neighbouring gradients as they are stored.

        Args:
            first: the first row.
            count: the number of gradients, k.

        Returns:
            A tree like the parameters with leaves ``(k, *shape)``.
        """
        self._check_unchanged()
        values = self.pages.read_rows(first, count).reshape(count, -1)[:, : self.layout.size]
        return jax.vmap(self.layout.unflatten)(jnp.asarray(values))

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> FileRows:
        del lower
        count, tiles, _, width = self.pages.shape

        def of_page(_: int, page: Shaped[np.ndarray, "t m w"]) -> Float[np.ndarray, "t k w"]:
            return np.asarray(_transform(_on_device(page), matrix))

        return self._map(of_page, (count, tiles, len(matrix), width), self.dtype)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        self._check_unchanged()
        _, tiles, _, width = self.pages.shape
        page_of, place = np.divmod(np.asarray(coordinates), tiles * width)
        tile, column = np.divmod(place, width)
        out = np.zeros((self.num_rows, len(page_of)), self.dtype)
        for i in np.unique(page_of):
            here = page_of == i
            page = self.pages.read(int(i))
            out[:, here] = page[tile[here], :, column[here]].T.astype(self.dtype)
        return jnp.asarray(out)

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        self._check_unchanged()
        *_, m, width = self.pages.shape
        first, last = int(start) // width, -(-(int(start) + size) // width)
        tiles = self.pages.read_tiles(first, last - first)
        begin = int(start) - first * width
        columns = np.moveaxis(tiles, 1, 0).reshape(m, -1)[:, begin : begin + size]
        return jnp.asarray(columns.astype(self.dtype))

    def _total(
        self,
        function: OfPage,
        shape: tuple[int, ...],
        pieces: tuple[Any, ...],
        beside: GradientRows | None = None,
    ) -> Array:
        total = jnp.zeros(shape, self.dtype)
        every = [self._each(), *([] if beside is None else [beside._each()])]  # type: ignore[attr-defined]
        for here in zip(*every, strict=True):
            pages = [_on_device(page) for _, page in here]
            own = _at(pieces, here[0][0])
            total = jax.block_until_ready(_added(total, pages, own, function=function))
        return total

    def _columns(
        self, function: OfPage, pieces: tuple[Any, ...], constants: tuple[Any, ...]
    ) -> Float[Array, "p t *k w"]:
        parts = [
            jax.block_until_ready(
                _of_page(_on_device(page), _at(pieces, i), constants, function=function)
            )
            for i, page in self._each()
        ]
        return jnp.stack(parts).astype(self.dtype)

    def _is_alike(self, other: GradientRows) -> bool:
        return isinstance(other, FileRows) and are_alike(other.pages.shape, self.pages.shape)

    def _each(self) -> Iterator[tuple[int, Shaped[np.ndarray, "t m w"]]]:
        """All pages; the next one is read while the caller works. Then a page changes."""
        self._check_unchanged()
        count = self.pages.shape[0]
        buffers = [self.pages.buffer() for _ in range(min(count, 2))]
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.pages.read, 0, buffers[0])
            for i in range(count):
                page = ahead.result()
                if i + 1 < count:
                    ahead = reader.submit(self.pages.read, i + 1, buffers[(i + 1) % 2])
                yield i, page

    def _map(
        self,
        function: Callable[[int, np.ndarray], np.ndarray],
        shape: tuple[int, int, int, int] | None = None,
        dtype: np.dtype | None = None,
    ) -> FileRows:
        """Rows in a file without a name: a function of all pages, by default of their shape."""
        shape, dtype = shape or self.pages.shape, dtype or self.pages.dtype
        out = PageFile(self.storage.temporary(), shape, dtype)
        out.reserve()
        for i, page in self._each():
            out.write_page(i, function(i, page))
        storage = replace(self.storage, dtype=dtype)
        return FileRows(out, self.layout, shape[2], storage, out.writes)

    def _copy(self) -> FileRows:
        return self._map(lambda _, page: page)

    def _cut_all(self, values: Shaped[np.ndarray, "k d"]) -> Shaped[np.ndarray, "k pt w"]:
        """Vectors of all coordinates, cut like the tiles of all pages."""
        count, tiles, _, width = self.pages.shape
        padded = np.pad(values, ((0, 0), (0, count * tiles * width - values.shape[1])))
        return padded.reshape(len(values), count * tiles, width)

    def _now(self) -> FileRows:
        return replace(self, writes=self.pages.writes)

    def _check_unchanged(self) -> None:
        if self.writes != self.pages.writes:
            raise RuntimeError(
                "these rows were written to since, and their files have changed; use the rows "
                "that the write returned."
            )


def _runs(flags: Bool[np.ndarray, " k"]) -> list[tuple[int, int]]:
    """The ends of each run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _on_device(page: Shaped[np.ndarray, "t m w"]) -> Shaped[Array, "t m w"]:
    """A page that must not change before the device has used it."""
    return jax.device_put(page, may_alias=True)


def _at(pieces: tuple[Any, ...], i: int) -> tuple[Any, ...]:
    """The parts of vectors on one page."""
    return jax.tree.map(lambda piece: piece[i], pieces)


@functools.partial(jax.jit, static_argnames="function")
def _of_page(
    page: Float[Array, "t m w"],
    pieces: tuple[Any, ...],
    constants: tuple[Any, ...],
    *,
    function: OfPage,
) -> Array:
    return function(page, pieces, constants)


@functools.partial(jax.jit, static_argnames="function")
def _added(total: Array, pages: list[Array], pieces: tuple[Any, ...], *, function: OfPage) -> Array:
    page, *beside = pages
    return total + function(page, pieces, tuple(beside)).astype(total.dtype)


@jax.jit
def _transform(page: Float[Array, "t m w"], matrix: Float[Array, "k m"]) -> Float[Array, "t k w"]:
    return kernels.transform(page, matrix)


@functools.partial(jax.jit, static_argnames=("num_rows", "dtype"))
def _flat(
    leaves: list[Array], *, num_rows: int, dtype: jnp.dtype
) -> tuple[Shaped[Array, "k d"], Bool[Array, " k"]]:
    """Stacked gradients as stored, and which of them are accepted."""
    count = len(leaves[0]) if leaves else 1
    flat = [leaf.reshape(count, -1).astype(dtype) for leaf in leaves]
    stored = jnp.concatenate([*flat, jnp.zeros((count, 0), dtype)], axis=1)
    squares = jnp.sum(stored.astype(accumulation_dtype(dtype)) ** 2, axis=1)
    return stored, jax.vmap(lambda square: is_small_enough(square, num_rows))(squares)
