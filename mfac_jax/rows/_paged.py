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
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks, kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.kernels._xla import accumulation_dtype
from mfac_jax.rows._base import GradientRows, is_small_enough
from mfac_jax.rows._pages import OfPage, PageRows, page_width
from mfac_jax.rows._storage import Storage, check_dtype, dtype_for

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
class PagedRows(PageRows):
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

    def step_bytes(self, platform: str) -> int:
        page = math.prod(self.pages.shape[1:]) * self.pages.dtype.itemsize
        return (1 if platform == "cpu" else 2) * page + 2 * self.layout.size * self.dtype.itemsize

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[PagedRows, Float[Array, " m"], Bool[Array, ""]]:
        rows, accepted = self.write(row, gradient)
        stored = self.layout.flatten(gradient, self.pages.dtype, "gradient")
        return rows, rows._dots(stored.astype(self.dtype)), accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[PagedRows, Bool[Array, ""]]:
        new = self._cut(self.layout.flatten(gradient, self.pages.dtype, "gradient"))
        accepted = is_small_enough(jnp.sum(new.astype(self.dtype) ** 2), self.num_rows)
        return self._with_row(row, new, accepted), accepted

    def clear(self, row: Int[Array, ""]) -> PagedRows:
        zeros = jnp.zeros((len(self.pages), self.pages.shape[2]), self.pages.dtype)
        return self._with_row(row, zeros, row < self.num_rows)

    def restrict(self, mask: PyTree) -> PagedRows:
        return _restrict(self, self._cut(self.layout.flat_mask(mask)))

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> PagedRows:
        del lower
        return _transform(self, matrix)

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

    def _total(
        self,
        function: OfPage,
        shape: tuple[int, ...],
        pieces: tuple[Any, ...],
        beside: GradientRows | None = None,
    ) -> Array:
        others = () if beside is None else (beside.pages,)  # type: ignore[attr-defined]
        return _total((self.pages, *others), pieces, function=function, shape=shape)

    def _columns(
        self, function: OfPage, pieces: tuple[Any, ...], constants: tuple[Any, ...]
    ) -> Float[Array, "p w"]:
        return _columns(self.pages, pieces, constants, function=function)

    def _is_alike(self, other: GradientRows) -> bool:
        return isinstance(other, PagedRows) and other.pages.shape[::2] == self.pages.shape[::2]

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


def _at(pieces: tuple[Any, ...], i: Int[Array, ""]) -> tuple[Any, ...]:
    """The parts of vectors on one page."""
    return jax.tree.map(lambda piece: lax.dynamic_slice_in_dim(piece, i, 1), pieces)


@functools.partial(jax.jit, static_argnames=("function", "shape"))
def _total(
    pages: tuple[Array, ...],
    pieces: tuple[Any, ...],
    *,
    function: OfPage,
    shape: tuple[int, ...],
) -> Array:
    dtype = accumulation_dtype(pages[0].dtype)

    def add(total: Array, i: Array, page: Array, *beside: Array) -> Array:
        return total + function(page, _at(pieces, i), beside).astype(dtype)

    return _fold(pages, add, jnp.zeros(shape, dtype))


@functools.partial(jax.jit, static_argnames="function")
def _columns(
    pages: Array, pieces: tuple[Any, ...], constants: tuple[Any, ...], *, function: OfPage
) -> Float[Array, "p w"]:
    dtype = accumulation_dtype(pages.dtype)

    def write(out: Array, i: Array, page: Array) -> Array:
        own = function(page, _at(pieces, i), constants).astype(dtype)
        return lax.dynamic_update_slice_in_dim(out, own, i, axis=0)

    return _fold((pages,), write, jnp.zeros(pages.shape[::2], dtype))


@jax.jit
def _transform(rows: PagedRows, matrix: Float[Array, "k m"]) -> PagedRows:
    count, _, width = rows.pages.shape

    def write(out: Array, i: Array, page: Array) -> Array:
        own = kernels.transform(page, matrix).astype(rows.dtype)
        return lax.dynamic_update_slice_in_dim(out, _where_it_is(out, own), i, axis=0)

    blank = _blank((count, len(matrix), width), rows.dtype, None)
    return PagedRows(_fold((rows.pages,), write, blank), rows.layout, len(matrix))


@jax.jit
def _restrict(rows: PagedRows, keep: Bool[Array, "p w"]) -> PagedRows:
    def step(i: Int[Array, ""], pages: Array) -> Array:
        page = _on_device(lax.dynamic_slice_in_dim(pages, i, 1))
        (here,) = _at((keep,), i)
        kept = jnp.where(here[:, None], page, jnp.zeros_like(page))
        return lax.dynamic_update_slice_in_dim(pages, _where_it_is(pages, kept), i, axis=0)

    return replace(rows, pages=lax.fori_loop(0, len(rows.pages), step, rows.pages))


@jax.jit
def _take(rows: PagedRows, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
    page_of, column = jnp.divmod(coordinates, rows.pages.shape[2])

    def pick(out: Array, i: Array, page: Array) -> Array:
        return jnp.where(page_of == i, page[0][:, column].astype(rows.dtype), out)

    zeros = jnp.zeros((rows.num_rows, len(coordinates)), rows.dtype)
    return _fold((rows.pages,), pick, zeros)


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
