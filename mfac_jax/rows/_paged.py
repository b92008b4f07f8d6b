"""Rows in the memory of the host, which the device reads page by page."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax import _checks, kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.kernels._xla import (
    WIDENS_WHOLE_BLOCKS,
    accumulation_dtype,
    combine_in_one_loop,
    dots_in_one_loop,
)
from mfac_jax.rows._base import GradientRows, is_small_enough
from mfac_jax.rows._pages import OfPage, PageRows, are_alike, page_shape, scan_bytes
from mfac_jax.rows._storage import Storage, check_dtype, dtype_for


@dataclass(frozen=True)
class Paged(Storage):
    """Stores gradients in the memory of the host; the device holds two pages of them.

    Each scan moves the window over the bus once. The rows work inside ``jit``, so they serve the
    optimizer, where a step takes two scans. A Gram matrix and whitening take one scan each.

    A page has some columns of all gradients. If a parameter has a ``NamedSharding``, each device
    of its mesh holds a part of the columns of every page.

    Attributes:
        columns: the number of columns of a page, rounded up to whole tiles of at most 8,192; by
            default a page takes 64 MiB.
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
        ((2, 1, 3, 2), 'pinned_host')
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

    def whitened_bytes(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.whitened_bytes`. They are other pages."""
        layout = Layout(params)
        shape, _ = self._pages(layout, num_rows, _mesh_of(params))
        return {"host": math.prod(shape) * layout.dtype.itemsize}

    def scan_bytes(self, params: PyTree, num_rows: int, platform: str) -> dict[str, int]:
        """See :meth:`Storage.scan_bytes`."""
        layout, mesh = Layout(params), _mesh_of(params)
        (count, tiles, m, width), dtype = self._pages(layout, num_rows, mesh)
        own = count, tiles, m, width // _num_devices(mesh)
        if platform == "cpu" and dtype == jnp.bfloat16 and WIDENS_WHOLE_BLOCKS:
            return {"device": math.prod(own) * layout.dtype.itemsize}
        return {"device": scan_bytes(own, layout.dtype.itemsize, platform)}

    def _pages(
        self, layout: Layout, num_rows: int, mesh: Mesh | AbstractMesh | None
    ) -> tuple[tuple[int, int, int, int], np.dtype]:
        """The shape and the dtype of the pages."""
        m, dtype = _checks.positive_int(num_rows, "num_rows"), dtype_for(layout, self.dtype)
        column_bytes, num_devices = m * dtype.itemsize, _num_devices(mesh)
        count, tiles, width = page_shape(self.columns, layout.size, column_bytes, num_devices)
        return (count, tiles, m, width), dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedRows(PageRows):
    """Gradients in the memory of the host, as pages of columns.

    Attributes:
        pages: ``G``; p pages (t, m, w) of t tiles, in the memory kind ``"pinned_host"``. The last
            page is padded with zeros.
        layout: the parameters that the gradients belong to.
        num_rows: ``m`` (static).
    """

    pages: Any  # an array, or what optax.tree.map_params puts in its place
    layout: Any  # a Layout, or what optax.tree.map_params puts in its place
    num_rows: int = field(metadata={"static": True})

    def step_bytes(self, platform: str) -> int:
        page = math.prod(self.pages.shape[1:]) * self.pages.dtype.itemsize
        parts = 0 if platform == "cpu" else 2 * page
        return parts + 2 * self.layout.size * self.dtype.itemsize

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
        count, tiles, _, width = self.pages.shape
        zeros = jnp.zeros((count, tiles, width), self.pages.dtype)
        return self._with_row(row, zeros, row < self.num_rows)

    def restrict(self, mask: PyTree) -> PagedRows:
        return _restrict(self, self._cut(self.layout.flat_mask(mask)))

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> PagedRows:
        del lower
        return _transform(self, matrix)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return _take(self, coordinates)

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        begin = jnp.asarray(start, jnp.int32)
        # A TPU cuts nothing smaller than pages out of the memory of the host.
        return lax.platform_dependent(
            self.pages,
            begin,
            tpu=functools.partial(_columns_of_pages, size=size),
            default=functools.partial(_columns_of_tiles, size=size),
        ).astype(self.dtype)

    def _dots(self, flat: Float[Array, " d"]) -> Float[Array, " m"]:
        return lax.platform_dependent(self, flat, cpu=_dots_at_once, default=PageRows._dots)

    def _combine(self, pieces: Any, constants: tuple[Any, ...]) -> Float[Array, "p t w"]:
        arrays = self, pieces, constants
        return lax.platform_dependent(*arrays, cpu=_combine_at_once, default=PageRows._combine)

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
    ) -> Float[Array, "p t *k w"]:
        return _columns(self.pages, pieces, constants, function=function)

    def _is_alike(self, other: GradientRows) -> bool:
        return isinstance(other, PagedRows) and are_alike(other.pages.shape, self.pages.shape)

    def _with_row(
        self, row: Int[Array, ""], new: Float[Array, "p t w"], accepted: Bool[Array, ""]
    ) -> PagedRows:
        """The rows with one replaced if the new one is accepted, in place under ``jit``.

        A slice along one axis crosses the bus alone and compilers change it where it is, so no new
        rows wait on the device.
        """
        there = _on_device(lax.dynamic_slice_in_dim(self.pages, row, 1, axis=2))
        back = _where_it_is(self.pages, jnp.where(accepted, new[:, :, None], there))
        return replace(self, pages=lax.dynamic_update_slice_in_dim(self.pages, back, row, axis=2))


def _on_device(page: Array) -> Array:
    return jax.device_put(page, jax.memory.Space.Device)


def _where_it_is(pages: Array, page: Array) -> Array:
    """The page in the memory in which the pages are."""
    return jax.device_put(page, jax.typeof(pages).memory_space)


# As large an integer as the counter of a loop, whatever JAX's default.
_ZERO = np.int32(0)


class _Place(NamedTuple):
    """Some tiles of one page, or all of them.

    Attributes:
        page: the number of the page.
        tile: the number of the first tile.
        tiles: how many there are (static).
    """

    page: Int[Array, ""]
    tile: Int[Array, ""] | np.int32
    tiles: int

    def read(self, array: Array) -> Array:
        """The part (tiles, ...) of an array (p, t, ...)."""
        sizes = (1, self.tiles, *array.shape[2:])
        return lax.dynamic_slice(array, self._start(array), sizes)[0]

    def write(self, array: Array, part: Array) -> Array:
        """The array with this part."""
        return lax.dynamic_update_slice(array, part[None], self._start(array))

    def _start(self, array: Array) -> tuple[Any, ...]:
        return (self.page, self.tile, *[_ZERO] * (array.ndim - 2))


def _fold(function: Callable[..., Array], pages: tuple[Array, ...], start: Array) -> Array:
    """``function(total, place, *parts)`` for all places, one after another."""
    return lax.platform_dependent(
        pages,
        start,
        cpu=functools.partial(_tile_by_tile, function),
        default=functools.partial(_looking_ahead, function),
    )


def _fetch(pages: tuple[Array, ...], place: _Place) -> tuple[Array, ...]:
    return tuple(_on_device(place.read(array)) for array in pages)


def _tile_by_tile(function: Callable[..., Array], pages: tuple[Array, ...], start: Array) -> Array:
    """For a CPU, where there is no bus.

    XLA copies what it takes out of the window, and a tile's copy stays in the cache. It would copy
    the whole window for a loop that looks ahead.
    """
    count, tiles = pages[0].shape[:2]

    def step(i: Int[Array, ""], total: Array) -> Array:
        place = _Place(i // tiles, i % tiles, 1)
        return function(total, place, *_fetch(pages, place))

    return lax.fori_loop(jnp.int32(0), jnp.int32(count * tiles), step, start)


def _looking_ahead(function: Callable[..., Array], pages: tuple[Array, ...], start: Array) -> Array:
    """Page by page; the next one is on its way while the function works."""
    count, tiles = pages[0].shape[:2]

    def step(i: Int[Array, ""], carry: tuple[Array, tuple[Array, ...]]) -> Any:
        total, here = carry
        ahead = _fetch(pages, _Place(i + 1, _ZERO, tiles))
        return function(total, _Place(i, _ZERO, tiles), *here), ahead

    first, last = (_Place(jnp.int32(i), _ZERO, tiles) for i in (0, count - 1))
    total, here = lax.fori_loop(first.page, last.page, step, (start, _fetch(pages, first)))
    return function(total, last, *here)


# These two read the pages once, and a copy of the pages would take a CPU longer. One fused loop
# makes no copy, whatever the dtype and the sharding.


@jax.jit
def _dots_at_once(rows: PagedRows, flat: Float[Array, " d"]) -> Float[Array, " m"]:
    """The products with a vector, for a CPU."""
    dots = jax.vmap(dots_in_one_loop)
    return jnp.sum(dots(_on_device(rows.pages), rows._cut(flat)), axis=0)


@jax.jit
def _combine_at_once(
    rows: PagedRows, pieces: Any, constants: tuple[Any, ...]
) -> Float[Array, "p t w"]:
    """See :meth:`PageRows._combine`; for a CPU."""
    coefficients, scale = constants
    pages, weights = _on_device(rows.pages), coefficients.astype(rows.dtype)
    if 1 in pages.shape[:2] and pages.dtype == rows.dtype:
        # XLA would take up to 50 times as long for a batch of one (measured).
        flat = combine_in_one_loop(pages.reshape(-1, *pages.shape[2:]), weights)
        out = flat.reshape(*pages.shape[:2], -1)
    else:
        out = jax.vmap(combine_in_one_loop, in_axes=(0, None))(pages, weights)
    if pieces is not None:
        out = pieces - out
    return out if scale is None else out * scale.astype(rows.dtype)


@functools.partial(jax.jit, static_argnames=("function", "shape"))
def _total(
    pages: tuple[Array, ...],
    pieces: tuple[Any, ...],
    *,
    function: OfPage,
    shape: tuple[int, ...],
) -> Array:
    dtype = accumulation_dtype(pages[0].dtype)

    def add(total: Array, place: _Place, part: Array, *beside: Array) -> Array:
        own = jax.tree.map(place.read, pieces)
        return total + function(part, own, beside).astype(dtype)

    return _fold(add, pages, jnp.zeros(shape, dtype))


@functools.partial(jax.jit, static_argnames="function")
def _columns(
    pages: Array, pieces: tuple[Any, ...], constants: tuple[Any, ...], *, function: OfPage
) -> Float[Array, "p t *k w"]:
    dtype = accumulation_dtype(pages.dtype)
    one = jax.tree.map(lambda array: array[0], pieces)
    like = jax.eval_shape(
        function, jax.ShapeDtypeStruct(pages.shape[1:], pages.dtype), one, constants
    )

    def write(out: Array, place: _Place, part: Array) -> Array:
        own = jax.tree.map(place.read, pieces)
        return place.write(out, function(part, own, constants).astype(dtype))

    return _fold(write, (pages,), jnp.zeros((len(pages), *like.shape), dtype))


def _columns_of_pages(
    pages: Shaped[Array, "p t m w"], start: Int[Array, ""], *, size: int
) -> Shaped[Array, "m size"]:
    count, tiles, _, width = pages.shape
    first, touched = _touched(start, size, tiles * width, count)
    there = _on_device(lax.dynamic_slice_in_dim(pages, first, touched))
    return _cut_out(there.reshape(-1, *pages.shape[2:]), start - first * tiles * width, size)


def _columns_of_tiles(
    pages: Shaped[Array, "p t m w"], start: Int[Array, ""], *, size: int
) -> Shaped[Array, "m size"]:
    count, tiles, _, width = pages.shape
    first, touched = _touched(start, size, width, count * tiles)

    def fetch(i: Int[Array, ""]) -> Shaped[Array, "m w"]:
        return _on_device(_Place(i // tiles, i % tiles, 1).read(pages))[0]

    there = lax.map(fetch, first + jnp.arange(touched, dtype=jnp.int32))
    return _cut_out(there, start - first * width, size)


def _touched(
    start: Int[Array, ""], size: int, width: int, count: int
) -> tuple[Int[Array, ""], int]:
    """The first of the parts of this width that hold the columns, and how many to read.

    Columns can start anywhere in a part, so they can touch one part more.
    """
    touched = min(-(-size // width) + 1, count)
    return jnp.minimum(start // width, count - touched), touched


def _cut_out(
    tiles: Shaped[Array, "t m w"], start: Int[Array, ""], size: int
) -> Shaped[Array, "m size"]:
    matrix = jnp.moveaxis(tiles, 1, 0).reshape(tiles.shape[1], -1)
    return lax.dynamic_slice_in_dim(matrix, start, size, 1)


@jax.jit
def _transform(rows: PagedRows, matrix: Float[Array, "k m"]) -> PagedRows:
    count, tiles, _, width = rows.pages.shape

    def write(out: Array, place: _Place, part: Array) -> Array:
        image = _image(part, matrix).astype(rows.dtype)
        return place.write(out, _where_it_is(out, image))

    blank = _blank((count, tiles, len(matrix), width), rows.dtype, None)
    return PagedRows(_fold(write, (rows.pages,), blank), rows.layout, len(matrix))


def _image(page: Float[Array, "t m w"], matrix: Float[Array, "k m"]) -> Float[Array, "t k w"]:
    """``M G`` of a page."""
    # XLA for a TPU would keep five pages for a loop over the tiles.
    return lax.platform_dependent(page, matrix, tpu=_image_at_once, default=kernels.transform)


def _image_at_once(
    page: Float[Array, "t m w"], matrix: Float[Array, "k m"]
) -> Float[Array, "t k w"]:
    acc = accumulation_dtype(page.dtype)
    product = functools.partial(jnp.dot, matrix.astype(acc), precision="highest")
    return jax.vmap(product)(page.astype(acc))


@jax.jit
def _restrict(rows: PagedRows, keep: Bool[Array, "p t w"]) -> PagedRows:
    tiles = rows.pages.shape[1]

    def step(i: Int[Array, ""], pages: Array) -> Array:
        place = _Place(i, _ZERO, tiles)
        page = _on_device(place.read(pages))
        kept = jnp.where(place.read(keep)[:, None], page, jnp.zeros_like(page))
        return place.write(pages, _where_it_is(pages, kept))

    pages = lax.fori_loop(jnp.int32(0), jnp.int32(len(rows.pages)), step, rows.pages)
    return replace(rows, pages=pages)


@jax.jit
def _take(rows: PagedRows, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
    _, tiles, _, width = rows.pages.shape
    page_of, inside = jnp.divmod(coordinates, tiles * width)
    tile_of, column = jnp.divmod(inside, width)

    def pick(out: Array, place: _Place, part: Array) -> Array:
        tile = tile_of - place.tile
        is_here = (page_of == place.page) & (tile >= 0) & (tile < place.tiles)
        return jnp.where(is_here, part[tile, :, column].T.astype(rows.dtype), out)

    return _fold(pick, (rows.pages,), jnp.zeros((rows.num_rows, len(coordinates)), rows.dtype))


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
    shape: tuple[int, int, int, int], dtype: jnp.dtype, mesh: Mesh | AbstractMesh | None
) -> Array:
    """Zero pages in the memory of the host, made page by page."""

    def make() -> Array:
        def page(carry: None, _: None) -> tuple[None, Array]:
            return carry, jax.device_put(jnp.zeros(shape[1:], dtype), jax.memory.Space.Host)

        return lax.scan(page, None, length=shape[0])[1]

    if mesh is None:
        return jax.jit(make)()
    spec = PartitionSpec(None, None, None, mesh.axis_names)
    return jax.jit(make, out_shardings=NamedSharding(mesh, spec, memory_kind="pinned_host"))()
