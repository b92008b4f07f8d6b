"""Rows in the memory of the host, which the device reads page by page."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax import _checks, kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.kernels._xla import accumulation_dtype
from mfac_jax.kernels._xla import products as products_of_blocks
from mfac_jax.rows._base import ColumnRows, GradientRows, WritableRows, is_small_enough
from mfac_jax.rows._storage import Storage, check_dtype, dtype_for

# A page takes at most 64 MiB, unless that is less than 128 columns. A bus moves it in a millisecond
# or more: long beside what it takes to start a copy, and small beside the memory of a device, which
# holds two pages.
PAGE_BYTES = 2**26

# The width of a page is a multiple of this, as the vector units of GPUs and TPUs require.
_ALIGNMENT = 128

Total = TypeVar("Total")


@dataclass(frozen=True)
class Paged(Storage):
    """Stores gradients in the memory of the host; the device holds two pages of them.

    Each scan moves the window over the bus once. The rows work inside ``jit``, so they serve the
    optimizer, where a step takes two scans. A Gram matrix and whitening take one scan each.

    A page has some columns of all gradients. If a parameter has a ``NamedSharding``, each device
    of its mesh holds a part of the columns of every page.

    Attributes:
        columns: the number of columns of a page; by default a page takes 64 MiB.
        dtype: the dtype of stored gradients: float32, bfloat16 or float64. By default it is
            float64 if a parameter is float64, and otherwise float32.

    Raises:
        TypeError: ``columns`` is not an int, or ``dtype`` is not a dtype.
        ValueError: ``columns`` is below 1, or ``dtype`` is another dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import rows
        >>> held = rows.as_rows(jnp.eye(3), storage=rows.Paged(columns=2))
        >>> held.pages.shape, held.pages.sharding.memory_kind
        ((2, 3, 2), 'pinned_host')
    """

    columns: int | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if self.columns is not None:
            _checks.positive_int(self.columns, "columns")
        object.__setattr__(self, "dtype", check_dtype(self.dtype))

    def empty(self, params: PyTree, num_rows: int) -> PagedRows:
        """See :meth:`Storage.empty`.

        Raises:
            ValueError: a page has more columns than the gradients.
        """
        layout, mesh = Layout(params), _mesh_of(params)
        shape, dtype = self._pages(layout, num_rows, mesh)
        return PagedRows(_blank(shape, dtype, mesh), layout, num_rows)

    def bytes_by_place(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.bytes_by_place`. One host has the pages of all devices."""
        shape, dtype = self._pages(Layout(params), num_rows, _mesh_of(params))
        return {"host": math.prod(shape) * dtype.itemsize}

    def _pages(
        self, layout: Layout, num_rows: int, mesh: Mesh | AbstractMesh | None
    ) -> tuple[tuple[int, int, int], np.dtype]:
        """The shape and the dtype of the pages."""
        m, dtype = _checks.positive_int(num_rows, "num_rows"), dtype_for(layout, self.dtype)
        width = page_width(self.columns, layout.size, m * dtype.itemsize, _num_devices(mesh))
        return (max(-(-layout.size // width), 1), m, width), dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedRows(WritableRows, ColumnRows):
    """Gradients in the memory of the host, as pages of columns.

    Attributes:
        pages: ``G``; (p, m, w) in the memory kind ``"pinned_host"``. The last page is padded with
            zeros.
        layout: the parameters that the gradients belong to.
        num_rows: ``m`` (static).
    """

    pages: Any  # an array, or what optax.tree.map_params puts in its place
    layout: Any  # a Layout, or what optax.tree.map_params puts in its place
    num_rows: int = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """The accumulation dtype."""
        return accumulation_dtype(self.pages.dtype)

    def step_bytes(self, platform: str) -> int:
        page = math.prod(self.pages.shape[1:]) * self.pages.dtype.itemsize
        return (1 if platform == "cpu" else 2) * page + 2 * self.layout.size * self.dtype.itemsize

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[PagedRows, Float[Array, " m"], Bool[Array, ""]]:
        rows, accepted = self.write(row, gradient)
        stored = rows._cut(self.layout.flatten(gradient, self.pages.dtype, "gradient"))
        return rows, _dots(rows, stored.astype(self.dtype)), accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[PagedRows, Bool[Array, ""]]:
        new = self._cut(self.layout.flatten(gradient, self.pages.dtype, "gradient"))
        accepted = is_small_enough(jnp.sum(new.astype(self.dtype) ** 2), self.num_rows)
        return self._with_row(row, new, accepted), accepted

    def clear(self, row: Int[Array, ""]) -> PagedRows:
        zeros = jnp.zeros((len(self.pages), self.pages.shape[2]), self.pages.dtype)
        return self._with_row(row, zeros, row < self.num_rows)

    def restrict(self, mask: PyTree) -> PagedRows:
        return _restrict(self, self._cut(self.layout.flat_mask(mask)))

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return _dots(self, self._cut(self.layout.flatten(vector, self.dtype, "vector")))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        pieces = None
        if vector is not None:
            pieces = self._cut(self.layout.flatten(vector, self.dtype, "vector"))
        return self._tree(_combine(self, coefficients, pieces, scale))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return _gram(self, None if mask is None else self._cut(self.layout.flat_mask(mask)))

    def products(self, other: GradientRows, mask: PyTree | None = None) -> Float[Array, "m k"]:
        is_alike = isinstance(other, PagedRows) and other.pages.shape[::2] == self.pages.shape[::2]
        if not is_alike:
            return super().products(other, mask)
        keep = None if mask is None else self._cut(self.layout.flat_mask(mask))
        return _products(self, other, keep)

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> PagedRows:
        del lower
        return _transform(self, matrix)

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        del lower
        return self._tree(_column_square_sums(self, matrix))

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return _take(self, coordinates)

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        # Columns can start anywhere in a page, so they can touch one page more.
        count, width = len(self.pages), self.pages.shape[2]
        touched = min(-(-size // width) + 1, count)
        first = jnp.minimum(start // width, count - touched)
        pages = _on_device(lax.dynamic_slice_in_dim(self.pages, first, touched))
        matrix = jnp.moveaxis(pages, 0, 1).reshape(self.num_rows, -1)
        return lax.dynamic_slice_in_dim(matrix, start - first * width, size, 1).astype(self.dtype)

    def _cut(self, flat: Shaped[Array, " d"]) -> Shaped[Array, "p w"]:
        """A vector of all coordinates, cut like the pages."""
        count, _, width = self.pages.shape
        return jnp.pad(flat, (0, count * width - flat.size)).reshape(count, width)

    def _tree(self, pieces: Float[Array, "p w"]) -> PyTree:
        return self.layout.unflatten(pieces.reshape(-1)[: self.layout.size])

    def _with_row(
        self, row: Int[Array, ""], new: Float[Array, "p w"], accepted: Bool[Array, ""]
    ) -> PagedRows:
        """The rows with one replaced if the new one is accepted, in place under ``jit``."""
        there = _on_device(lax.dynamic_slice_in_dim(self.pages, row, 1, axis=1))
        back = _where_it_is(self.pages, jnp.where(accepted, new[:, None], there))
        return replace(self, pages=lax.dynamic_update_slice_in_dim(self.pages, back, row, axis=1))


def _on_device(page: Array) -> Array:
    return jax.device_put(page, jax.memory.Space.Device)


def _where_it_is(pages: Array, page: Array) -> Array:
    """The page in the memory in which the pages are."""
    return jax.device_put(page, jax.typeof(pages).memory_space)


def _fold(
    pages: tuple[Array, ...],
    function: Callable[..., Total],
    start: Total,
) -> Total:
    """``function(total, i, *pages)`` for one page of each after another."""
    # On a CPU there is no bus, and XLA would copy the window for a loop that looks ahead.
    return lax.platform_dependent(
        pages,
        start,
        cpu=functools.partial(_one_by_one, function),
        default=functools.partial(_looking_ahead, function),
    )


def _fetch(pages: tuple[Array, ...], i: Int[Array, ""]) -> tuple[Array, ...]:
    return tuple(_on_device(lax.dynamic_slice_in_dim(p, i, 1)) for p in pages)


def _one_by_one(function: Callable[..., Total], pages: tuple[Array, ...], start: Total) -> Total:
    def step(i: Int[Array, ""], total: Total) -> Total:
        return function(total, i, *_fetch(pages, i))

    return lax.fori_loop(0, len(pages[0]), step, start)


def _looking_ahead(function: Callable[..., Total], pages: tuple[Array, ...], start: Total) -> Total:
    """The next page is on its way while the function works."""

    def step(i: Int[Array, ""], carry: tuple[Total, tuple[Array, ...]]) -> Any:
        total, here = carry
        ahead = _fetch(pages, i + 1)
        return function(total, i, *here), ahead

    last = jnp.int32(len(pages[0]) - 1)
    total, here = lax.fori_loop(jnp.int32(0), last, step, (start, _fetch(pages, jnp.int32(0))))
    return function(total, last, *here)


def _at(pieces: Shaped[Array, "p w"], i: Int[Array, ""]) -> Shaped[Array, "1 w"]:
    return lax.dynamic_slice_in_dim(pieces, i, 1)


@jax.jit
def _dots(rows: PagedRows, vector: Float[Array, "p w"]) -> Float[Array, " m"]:
    def add(total: Array, i: Array, page: Array) -> Array:
        return total + kernels.dots(page, _at(vector, i)).astype(rows.dtype)

    return _fold((rows.pages,), add, jnp.zeros(rows.num_rows, rows.dtype))


@jax.jit
def _combine(
    rows: PagedRows,
    coefficients: Float[Array, " m"],
    vector: Float[Array, "p w"] | None,
    scale: Float[Array, ""] | None,
) -> Float[Array, "p w"]:
    def write(out: Array, i: Array, page: Array) -> Array:
        piece = None if vector is None else _at(vector, i)
        own = kernels.combine(page, coefficients, vector=piece, scale=scale, dtype=rows.dtype)
        return lax.dynamic_update_slice_in_dim(out, own, i, axis=0)

    count, _, width = rows.pages.shape
    return _fold((rows.pages,), write, jnp.zeros((count, width), rows.dtype))


@jax.jit
def _gram(rows: PagedRows, mask: Bool[Array, "p w"] | None) -> Float[Array, "m m"]:
    def add(total: Array, i: Array, page: Array) -> Array:
        keep = None if mask is None else _at(mask, i)
        return total + kernels.gram(page, keep).astype(rows.dtype)

    return _fold((rows.pages,), add, jnp.zeros((rows.num_rows,) * 2, rows.dtype))


@jax.jit
def _products(
    rows: PagedRows, other: PagedRows, mask: Bool[Array, "p w"] | None
) -> Float[Array, "m k"]:
    def add(total: Array, i: Array, page: Array, beside: Array) -> Array:
        keep = None if mask is None else _at(mask, i)
        return total + products_of_blocks(page, beside, keep).astype(rows.dtype)

    zeros = jnp.zeros((rows.num_rows, other.num_rows), rows.dtype)
    return _fold((rows.pages, other.pages), add, zeros)


@jax.jit
def _transform(rows: PagedRows, matrix: Float[Array, "k m"]) -> PagedRows:
    count, _, width = rows.pages.shape

    def write(out: Array, i: Array, page: Array) -> Array:
        own = kernels.transform(page, matrix).astype(rows.dtype)
        return lax.dynamic_update_slice_in_dim(out, _where_it_is(out, own), i, axis=0)

    blank = _blank((count, len(matrix), width), rows.dtype, None)
    return PagedRows(_fold((rows.pages,), write, blank), rows.layout, len(matrix))


@jax.jit
def _column_square_sums(rows: PagedRows, matrix: Float[Array, "k m"] | None) -> Float[Array, "p w"]:
    def write(out: Array, i: Array, page: Array) -> Array:
        own = kernels.column_square_sums(page, matrix).astype(rows.dtype)
        return lax.dynamic_update_slice_in_dim(out, own, i, axis=0)

    count, _, width = rows.pages.shape
    return _fold((rows.pages,), write, jnp.zeros((count, width), rows.dtype))


@jax.jit
def _restrict(rows: PagedRows, keep: Bool[Array, "p w"]) -> PagedRows:
    def step(i: Int[Array, ""], pages: Array) -> Array:
        page = _on_device(lax.dynamic_slice_in_dim(pages, i, 1))
        kept = jnp.where(_at(keep, i)[:, None], page, jnp.zeros_like(page))
        return lax.dynamic_update_slice_in_dim(pages, _where_it_is(pages, kept), i, axis=0)

    return replace(rows, pages=lax.fori_loop(0, len(rows.pages), step, rows.pages))


@jax.jit
def _take(rows: PagedRows, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
    page_of, column = jnp.divmod(coordinates, rows.pages.shape[2])

    def pick(out: Array, i: Array, page: Array) -> Array:
        return jnp.where(page_of == i, page[0][:, column].astype(rows.dtype), out)

    zeros = jnp.zeros((rows.num_rows, len(coordinates)), rows.dtype)
    return _fold((rows.pages,), pick, zeros)


def page_width(columns: int | None, size: int, column_bytes: int, num_devices: int = 1) -> int:
    """The number of columns of a page.

    Args:
        columns: the number that was asked for; None for a page of 64 MiB.
        size: the number of columns of all pages.
        column_bytes: the size of a column.
        num_devices: the number of devices that share a page.

    Raises:
        ValueError: a page has more columns than there are, or they cannot be shared.
    """
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
        return columns
    step = _ALIGNMENT * num_devices
    most = max(PAGE_BYTES // column_bytes // step, 1) * step
    if size <= most:
        return max(-(-size // num_devices), 1) * num_devices
    pages = -(-size // most)
    return -(-size // (pages * step)) * step


def _num_devices(mesh: Mesh | AbstractMesh | None) -> int:
    return 1 if mesh is None else mesh.size


def _mesh_of(params: PyTree) -> Mesh | AbstractMesh | None:
    """The mesh of the parameters; None without a ``NamedSharding``."""
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    return None


def _blank(
    shape: tuple[int, int, int], dtype: jnp.dtype, mesh: Mesh | AbstractMesh | None
) -> Array:
    """Zero pages in the memory of the host, made page by page."""

    def make() -> Array:
        def page(carry: None, _: None) -> tuple[None, Array]:
            return carry, jax.device_put(jnp.zeros(shape[1:], dtype), jax.memory.Space.Host)

        return lax.scan(page, None, length=shape[0])[1]

    if mesh is None:
        return jax.jit(make)()
    spec = PartitionSpec(None, None, mesh.axis_names)
    return jax.jit(make, out_shardings=NamedSharding(mesh, spec, memory_kind="pinned_host"))()
