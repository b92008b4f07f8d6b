"""What rows on pages share: a page has some columns of all gradients.

A scan takes one page after another. Where the pages are, and who moves them, is up to the derived
class: :class:`PagedRows` in the memory of the host, :class:`FileRows` on disk.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from mfac_jax import kernels
from mfac_jax._layout import PyTree
from mfac_jax.kernels._xla import MAX_TILE, accumulation_dtype
from mfac_jax.kernels._xla import products as products_of_blocks
from mfac_jax.rows._base import ColumnRows, GradientRows, WritableRows

# A page takes at most 64 MiB, unless that is less than 128 columns. A bus moves it in a millisecond
# or more: long beside what it takes to start a copy, and small beside the memory of a device, which
# holds two pages.
PAGE_BYTES = 2**26

# The width of a tile is a multiple of this, as the vector units of GPUs and TPUs require.
_ALIGNMENT = 128

# ``function(page, pieces, constants)``: of a page (t, m, w), of the parts (t, w) of vectors, and of
# arrays that every page takes whole; None stands for a vector that is not there.
OfPage = Callable[[Array, tuple[Any, ...], tuple[Any, ...]], Array]


def scan_bytes(shape: tuple[int, int, int, int], itemsize: int, platform: str) -> int:
    """:meth:`Storage.scan_bytes` of rows on pages.

    Args:
        shape: of the pages (p, t, m, w), as far as they are on one device.
        itemsize: the bytes of a number.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
    """
    if platform == "cpu":  # a tile and its image
        return 2 * itemsize * math.prod(shape[2:])
    return 2 * held_pages(shape) * itemsize  # pages and what becomes of them


def held_pages(shape: tuple[int, int, int, int]) -> int:
    """The number of entries of the pages that are held at a time: two, or one if it is all."""
    return min(shape[0], 2) * math.prod(shape[1:])


class PageRows(WritableRows, ColumnRows):
    """Gradients on pages (p, t, m, w) of t tiles of columns; the last page is padded with zeros.

    Attributes:
        pages: the pages, with a shape and a dtype.
    """

    pages: Any

    @abc.abstractmethod
    def _total(
        self,
        function: OfPage,
        shape: tuple[int, ...],
        pieces: tuple[Any, ...],
        beside: GradientRows | None = None,
    ) -> Array:
        """The sum of ``function`` over all pages.

        Args:
            function: its results have the shape of the sum. Functions that do the same are equal.
            shape: of the sum.
            pieces: vectors, cut like the pages.
            beside: other rows, of as many and as wide pages, which the function takes as constants.
        """

    @abc.abstractmethod
    def _columns(
        self, function: OfPage, pieces: tuple[Any, ...], constants: tuple[Any, ...]
    ) -> Float[Array, "p t *k w"]:
        """The results (t, ..., w) of ``function`` for all pages."""

    @abc.abstractmethod
    def _is_alike(self, other: GradientRows) -> bool:
        """Whether other rows have as many and as wide pages, in the same place."""

    @property
    def dtype(self) -> jnp.dtype:
        """The accumulation dtype."""
        return accumulation_dtype(self.pages.dtype)

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return self._dots(self.layout.flatten(vector, self.dtype, "vector"))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        flat = None if vector is None else self.layout.flatten(vector, self.dtype, "vector")
        pieces = None if flat is None else self._cut(flat)
        return self._tree(self._combine(pieces, (coefficients, scale)))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return self._total(_gram, (self.num_rows,) * 2, (self._cut_mask(mask),))

    def products(self, other: GradientRows, mask: PyTree | None = None) -> Float[Array, "m k"]:
        if not self._is_alike(other):
            return super().products(other, mask)
        shape = self.num_rows, other.num_rows
        return self._total(_products, shape, (self._cut_mask(mask),), other)

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        del lower
        return self._tree(self._columns(_square_sums, (), (matrix,)))

    def both_column_square_sums(
        self, matrix: Float[Array, "k m"], *, lower: bool = False
    ) -> tuple[PyTree, PyTree]:
        del lower
        both = self._columns(_both_square_sums, (), (matrix,))
        return self._tree(both[:, :, 0]), self._tree(both[:, :, 1])

    def _dots(self, flat: Float[Array, " d"]) -> Float[Array, " m"]:
        return self._total(_dots, (self.num_rows,), (self._cut(flat),))

    def _combine(self, pieces: Any, constants: tuple[Any, ...]) -> Float[Array, "p t w"]:
        """``G^T c``, or ``(v - G^T c) scale``.

        Args:
            pieces: ``v``, cut like the pages, or None.
            constants: ``c``, and the scale or None.
        """
        return self._columns(_combined, (pieces,), constants)

    def _cut(self, flat: Shaped[Array, " d"]) -> Shaped[Array, "p t w"]:
        """A vector of all coordinates, cut like the pages."""
        count, tiles, _, width = self.pages.shape
        padded = jnp.pad(flat, (0, count * tiles * width - flat.size))
        return padded.reshape(count, tiles, width)

    def _cut_mask(self, mask: PyTree | None) -> Bool[Array, "p t w"] | None:
        return None if mask is None else self._cut(self.layout.flat_mask(mask))

    def _tree(self, pieces: Float[Array, "p t w"]) -> PyTree:
        return self.layout.unflatten(pieces.reshape(-1)[: self.layout.size])


def _dots(page: Array, pieces: tuple[Any, ...], _: tuple[Any, ...]) -> Float[Array, " m"]:
    return kernels.dots(page, *pieces)


def _gram(page: Array, pieces: tuple[Any, ...], _: tuple[Any, ...]) -> Float[Array, "m m"]:
    return kernels.gram(page, *pieces)


def _products(page: Array, pieces: tuple[Any, ...], beside: tuple[Any, ...]) -> Float[Array, "m k"]:
    return products_of_blocks(page, *beside, *pieces)


def _combined(
    page: Array, pieces: tuple[Any, ...], constants: tuple[Any, ...]
) -> Float[Array, "t w"]:
    (vector,), (coefficients, scale) = pieces, constants
    dtype = accumulation_dtype(page.dtype)
    return kernels.combine(page, coefficients, vector=vector, scale=scale, dtype=dtype)


def _square_sums(
    page: Array, pieces: tuple[Any, ...], constants: tuple[Any, ...]
) -> Float[Array, "t w"]:
    del pieces
    return kernels.column_square_sums(page, *constants)


def _both_square_sums(
    page: Array, pieces: tuple[Any, ...], constants: tuple[Any, ...]
) -> Float[Array, "t 2 w"]:
    sums = _square_sums(page, pieces, ()), _square_sums(page, pieces, constants)
    return jnp.stack(sums, axis=1)


def are_alike(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether pages of these shapes have the same columns."""
    return (*shape[:2], shape[3]) == (*other[:2], other[3])


def page_shape(
    columns: int | None, size: int, column_bytes: int, num_devices: int = 1
) -> tuple[int, int, int]:
    """The number of pages, of tiles of a page and of columns of a tile.

    Args:
        columns: the least number of columns of a page; None for a page of 64 MiB.
        size: the number of columns of all pages.
        column_bytes: the size of a column.
        num_devices: the number of devices that share a tile.

    Raises:
        ValueError: a page has more columns than there are, or they cannot be shared.
    """
    step = _ALIGNMENT * num_devices
    if step > MAX_TILE:
        step = num_devices
    # Products cut a wider tile, and would then gather one that devices share.
    widest = max(MAX_TILE // step, 1) * step
    if columns is not None:
        if columns > size > 0:
            raise ValueError(
                f"columns must be at most the number of columns of the gradients, {size}; "
                f"got {columns}."
            )
        if columns % num_devices:
            raise ValueError(
                f"columns must be a multiple of the {num_devices} devices that share a page, "
                f"got {columns}."
            )
        tiles, step = -(-columns // widest), num_devices
        width = -(-columns // tiles)
    else:
        unit = widest if widest * column_bytes <= PAGE_BYTES else step
        most = max(PAGE_BYTES // column_bytes // unit, 1) * unit
        pages = max(-(-size // most), 1)
        tiles = max(-(-size // (pages * widest)), 1)
        width = -(-size // (pages * tiles))
        if pages == tiles == 1:
            step = num_devices
    width = max(-(-width // step), 1) * step
    return max(-(-size // (tiles * width)), 1), tiles, width
