"""Rows that keep every number, in one block or in one block for each parameter."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax import kernels
from mfac_jax._layout import PyTree
from mfac_jax.kernels._xla import MAX_TILE, accumulation_dtype, set_row
from mfac_jax.kernels._xla import products as products_of_blocks
from mfac_jax.kernels.backends import check_supports, for_operation
from mfac_jax.rows._base import ColumnRows, GradientRows, WritableRows, is_small_enough

# The width of a tile is a multiple of this, as the vector units of GPUs and TPUs require.
_ALIGNMENT = 128

# The operations of a storage that have kernels.
_SCANS = ("dots", "write_row", "combine")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseRows(WritableRows, ColumnRows):
    """Every number of every gradient, in the memory of the device.

    Flat packing stores flattened gradients, cut into tiles of columns. The tiles lie in memory
    one after another. A scan is one launch and reads the block from end to end. The last tile is
    padded with zeros.

    Leaf packing stores one block for each parameter. The block can have the parameter's sharding,
    after an unsharded axis of rows. A step of the optimizer then never gathers sharded parameters:
    the devices only exchange the m numbers of a product. Outside of ``jit``, where the sharding is
    known, Gram matrices and diagonals gather nothing either. Columns are gathered.

    Attributes:
        blocks: ``G``. Flat packing: one array (t, m, k) of t tiles with ``t k >= d``. Leaf
            packing: a tree like the parameters with leaves ``(m, *shape)``. Float32,
            bfloat16, float64 or float16.
        layout: the parameters that the gradients belong to.
        num_rows: ``m`` (static).
        packing: ``"flat"`` or ``"leaf"`` (static).
        implementation: which implementation the kernels use; None for the best one on each
            platform (static).
    """

    blocks: PyTree
    layout: Any  # a Layout, or what optax.tree.map_params puts in its place
    num_rows: int = field(metadata={"static": True})
    packing: str = field(metadata={"static": True})
    implementation: str | None = field(metadata={"static": True}, default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The accumulation dtype."""
        dtypes = [accumulation_dtype(block.dtype) for block in jax.tree.leaves(self.blocks)]
        return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))

    def supported(self) -> DenseRows:
        """These rows, once their implementation is known to support the shapes and dtypes.

        Raises:
            ValueError: it does not.
        """
        for operation in _SCANS:
            chosen = for_operation(self.implementation, operation)
            for tile in self._tiles():
                check_supports(chosen, operation, jax.core.ShapedArray(tile.shape, tile.dtype))
        return self

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[DenseRows, Float[Array, " m"], Bool[Array, ""]]:
        pieces, accepted = self._gradient(gradient)
        chosen = for_operation(self.implementation, "write_row")
        pairs = [
            kernels.write_row(block, row, piece, accepted, implementation=chosen)
            for block, piece in zip(self._tiles(), pieces, strict=True)
        ]
        dots = self._total([dots for _, dots in pairs], (self.num_rows,))
        return self._with([block for block, _ in pairs]), dots, accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[DenseRows, Bool[Array, ""]]:
        pieces, accepted = self._gradient(gradient)
        written = [
            set_row(block, row, piece, accepted)
            for block, piece in zip(self._tiles(), pieces, strict=True)
        ]
        return self._with(written), accepted

    def clear(self, row: Int[Array, ""]) -> DenseRows:
        return self._with([block.at[:, row].set(0) for block in self._tiles()])

    def restrict(self, mask: PyTree) -> DenseRows:
        kept = [
            jnp.where(keep[:, None], block, jnp.zeros_like(block))
            for block, keep in zip(self._tiles(), self._cut_mask(mask), strict=True)
        ]
        return self._with(kept)

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return _dots(self, tuple(map(jnp.asarray, self.layout.check(vector, "vector"))))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        leaves = None
        if vector is not None:
            leaves = tuple(map(jnp.asarray, self.layout.check(vector, "vector")))
        return _combine(self, coefficients, leaves, scale)

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        keep = None if mask is None else tuple(self.layout.check_mask(mask))
        if self._is_spread():
            lower = jnp.tril(_products_of_shards(self, self, keep))
            return lower + jnp.tril(lower, -1).T
        return _gram(self, keep)

    def products(self, other: GradientRows, mask: PyTree | None = None) -> Float[Array, "m k"]:
        if not isinstance(other, DenseRows) or not self._is_cut_like(other):
            return super().products(other, mask)
        function = _products_of_shards if self._is_spread() else _products
        return function(self, other, None if mask is None else tuple(self.layout.check_mask(mask)))

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> DenseRows:
        return _transform(self, matrix, lower=lower)

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        if self._is_spread():
            return _column_square_sums_of_shards(self, matrix)
        return _column_square_sums(self, matrix, lower=lower)

    def both_column_square_sums(
        self, matrix: Float[Array, "k m"], *, lower: bool = False
    ) -> tuple[PyTree, PyTree]:
        if self._is_spread():
            return self.column_square_sums(), self.column_square_sums(matrix, lower=lower)
        return _both_column_square_sums(self, matrix, lower=lower)

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        if self.packing == "flat":
            return _columns_of_tiles(self.blocks, start, size).astype(self.dtype)
        if not isinstance(start, int):
            return super().columns(start, size)
        parts, offset = [], 0
        for block, width in zip(self._leaves(), self.layout.sizes, strict=True):
            first, last = max(start - offset, 0), min(start + size - offset, width)
            if first < last:
                matrix = block.reshape(self.num_rows, width)
                parts.append(matrix[:, first:last].astype(self.dtype))
            offset += width
        return jnp.concatenate(parts, axis=1)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return _take(self, coordinates)

    def step_bytes(self, platform: str) -> int:
        itemsize = self.dtype.itemsize
        leaves = jax.tree.leaves(self.blocks)
        rows = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize for leaf in leaves]
        vectors = sum(rows) // self.num_rows
        is_narrow = any(leaf.dtype != self.dtype for leaf in leaves)
        if platform != "cpu":
            return vectors * 4 // 3 if self.packing == "flat" else 0
        if self.packing == "flat":
            # XLA for a CPU widens all rows to change one.
            return vectors + sum(rows) if is_narrow else 3 * vectors
        # It copies the blocks of parameters with axes of length one, and of the others it widens
        # some at a time.
        copied = [size for size, leaf in zip(rows, leaves, strict=True) if 1 in leaf.shape[1:]]
        widened = 2 * max(rows, default=0) if is_narrow else 0
        return vectors + max(sum(copied), widened)

    def _is_cut_like(self, other: DenseRows) -> bool:
        """Whether the tiles of other rows have the columns of these."""
        shapes, others = ([t.shape for t in rows._tiles()] for rows in (self, other))
        cuts = [[(shape[0], *shape[2:]) for shape in each] for each in (shapes, others)]
        return self.packing == other.packing and cuts[0] == cuts[1]

    def _is_spread(self) -> bool:
        """Whether devices share a leaf. It is not known while ``jit`` traces."""
        if self.packing == "flat":
            return False
        known = [leaf for leaf in self._leaves() if not isinstance(leaf, jax.core.Tracer)]
        found = [getattr(leaf, "sharding", None) for leaf in known]  # NumPy's arrays have none
        return any(isinstance(s, NamedSharding) and not s.is_fully_replicated for s in found)

    def _leaves(self) -> list[Array]:
        return list(jax.tree.leaves(self.blocks))

    def _tiles(self) -> list[Shaped[Array, "t m ..."]]:
        """The blocks in the shape that the kernels take."""
        return [self.blocks] if self.packing == "flat" else [b[None] for b in self._leaves()]

    def _with(self, tiles: Sequence[Array], num_rows: int | None = None) -> DenseRows:
        """The rows with other blocks, in the form of :meth:`_tiles`."""
        leaves = tiles if self.packing == "flat" else [tile[0] for tile in tiles]
        blocks = jax.tree.unflatten(jax.tree.structure(self.blocks), leaves)
        return replace(self, blocks=blocks, num_rows=num_rows or self.num_rows)

    def _cut(self, leaves: Sequence[Array], dtype: jnp.dtype) -> list[Shaped[Array, "t ..."]]:
        """The leaves of a vector, cut like the rows."""
        if self.packing == "leaf":
            return [leaf[None] for leaf in leaves]
        count, _, width = self.blocks.shape
        flat = jnp.concatenate([*map(jnp.ravel, leaves), jnp.zeros(0, dtype)])
        return [jnp.pad(flat, (0, count * width - flat.size)).reshape(count, width)]

    def _cut_mask(self, mask: PyTree) -> list[Bool[Array, "t ..."]]:
        return self._cut(self.layout.check_mask(mask), jnp.dtype(bool))

    def _cut_vector(self, leaves: Sequence[Array] | None) -> list[Any]:
        if leaves is None:
            return [None] * len(self._tiles())
        if self.packing == "flat":
            leaves = [leaf.astype(self.dtype) for leaf in leaves]
        return self._cut(leaves, self.dtype)

    def _tree(self, pieces: Sequence[Float[Array, "t ..."]]) -> PyTree:
        """Results for each block as a tree like the parameters."""
        if self.packing == "flat":
            return self.layout.unflatten(pieces[0].reshape(-1)[: self.layout.size])
        leaves = [piece[0].astype(self.dtype) for piece in pieces]
        return jax.tree.unflatten(self.layout.treedef, leaves)

    def _gradient(self, gradient: PyTree) -> tuple[list[Array], Bool[Array, ""]]:
        """The pieces of a gradient as stored, and whether the gradient is accepted."""
        leaves = [jnp.asarray(leaf) for leaf in self.layout.check(gradient, "gradient")]
        if self.packing == "flat":
            stored = [leaf.astype(self.blocks.dtype) for leaf in leaves]
        else:
            pairs = zip(leaves, self._leaves(), strict=True)
            stored = [leaf.astype(block.dtype) for leaf, block in pairs]
        pieces = self._cut(stored, stored[0].dtype if stored else self.dtype)
        # Squares of the pieces: flat packing needs one reduction, not one for each parameter.
        squares = [jnp.sum(piece.astype(self.dtype) ** 2) for piece in pieces]
        return pieces, is_small_enough(self._total(squares), self.num_rows)

    def _total(self, terms: Sequence[Array], shape: tuple[int, ...] = ()) -> Array:
        wide = [term.astype(self.dtype) for term in terms]
        return functools.reduce(operator.add, wide) if wide else jnp.zeros(shape, self.dtype)


# Jitted for eager callers. The callers check trees first, because their errors show the trees.
@jax.jit
def _dots(rows: DenseRows, leaves: tuple[Array, ...]) -> Float[Array, " m"]:
    chosen = for_operation(rows.implementation, "dots")
    pairs = zip(rows._tiles(), rows._cut_vector(leaves), strict=True)
    terms = [kernels.dots(tile, piece, implementation=chosen) for tile, piece in pairs]
    return rows._total(terms, (rows.num_rows,))


@jax.jit
def _combine(
    rows: DenseRows,
    coefficients: Float[Array, " m"],
    leaves: tuple[Array, ...] | None,
    scale: Float[Array, ""] | None,
) -> PyTree:
    chosen = for_operation(rows.implementation, "combine")
    combined = [
        kernels.combine(
            tile,
            coefficients,
            vector=piece,
            scale=scale,
            dtype=rows.dtype,
            implementation=chosen,
        )
        for tile, piece in zip(rows._tiles(), rows._cut_vector(leaves), strict=True)
    ]
    return rows._tree(combined)


@jax.jit
def _gram(rows: DenseRows, mask: tuple[Array, ...] | None) -> Float[Array, "m m"]:
    tiles = rows._tiles()
    masks: list[Any] = [None] * len(tiles)
    if mask is not None:
        masks = rows._cut(mask, jnp.dtype(bool))
    terms = [kernels.gram(tile, keep) for tile, keep in zip(tiles, masks, strict=True)]
    return rows._total(terms, (rows.num_rows, rows.num_rows))


@jax.jit
def _products(
    rows: DenseRows, other: DenseRows, mask: tuple[Array, ...] | None
) -> Float[Array, "m k"]:
    tiles = rows._tiles()
    masks: list[Any] = [None] * len(tiles)
    if mask is not None:
        masks = rows._cut(mask, jnp.dtype(bool))
    triples = zip(tiles, other._tiles(), masks, strict=True)
    terms = [products_of_blocks(*triple) for triple in triples]
    return rows._total(terms, (rows.num_rows, other.num_rows))


@jax.jit
def _products_of_shards(
    rows: DenseRows, other: DenseRows, mask: tuple[Array, ...] | None
) -> Float[Array, "m k"]:
    """Products of leaves in their own shapes: each device multiplies its part."""

    def product(g: Shaped[Array, "m ..."], h: Shaped[Array, "k ..."]) -> Float[Array, "m k"]:
        axes, wide = tuple(range(1, g.ndim)), np.promote_types(g.dtype, h.dtype)
        return lax.dot_general(
            g.astype(wide),
            h.astype(wide),
            ((axes, axes), ((), ())),
            precision="highest",
            preferred_element_type=accumulation_dtype(wide),
        )

    leaves = rows._leaves()
    if mask is not None:
        pairs = zip(leaves, mask, strict=True)
        leaves = [jnp.where(keep[None], g, jnp.zeros_like(g)) for g, keep in pairs]
    terms = [product(g, h) for g, h in zip(leaves, other._leaves(), strict=True)]
    return rows._total(terms, (rows.num_rows, other.num_rows))


@jax.jit
def _column_square_sums_of_shards(rows: DenseRows, matrix: Float[Array, "k m"] | None) -> PyTree:
    def sums(g: Shaped[Array, "m ..."]) -> Float[Array, "..."]:
        wide = g.astype(rows.dtype)
        if matrix is not None:
            contract = (((1,), (0,)), ((), ()))
            wide = lax.dot_general(matrix.astype(rows.dtype), wide, contract, precision="highest")
        return jnp.sum(wide**2, axis=0)

    return jax.tree.map(sums, rows.blocks)


@functools.partial(jax.jit, static_argnames="lower")
def _transform(rows: DenseRows, matrix: Float[Array, "k m"], *, lower: bool) -> DenseRows:
    moved = [
        kernels.transform(tile, matrix, lower=lower).astype(rows.dtype) for tile in rows._tiles()
    ]
    return rows._with(moved, matrix.shape[0])


@functools.partial(jax.jit, static_argnames="lower")
def _column_square_sums(
    rows: DenseRows, matrix: Float[Array, "k m"] | None, *, lower: bool
) -> PyTree:
    sums = [kernels.column_square_sums(tile, matrix, lower=lower) for tile in rows._tiles()]
    return rows._tree(sums)


@functools.partial(jax.jit, static_argnames="lower")
def _both_column_square_sums(
    rows: DenseRows, matrix: Float[Array, "k m"], *, lower: bool
) -> tuple[PyTree, PyTree]:
    # One program; each of the two forms reads the gradients in its own order.
    return rows.column_square_sums(), rows.column_square_sums(matrix, lower=lower)


@jax.jit
def _take(rows: DenseRows, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
    if rows.packing == "flat":
        return lax.platform_dependent(
            rows.blocks, coordinates, cpu=_take_row_by_row, default=_take_at_once
        ).astype(rows.dtype)
    out = jnp.zeros((rows.num_rows, coordinates.shape[0]), rows.dtype)
    starts = np.cumsum((0, *rows.layout.sizes))
    for block, start, width in zip(rows._leaves(), starts, rows.layout.sizes, strict=False):
        if width:
            local = coordinates - int(start)
            values = block.reshape(rows.num_rows, width)[:, jnp.clip(local, 0, width - 1)]
            inside = (local >= 0) & (local < width)
            out = jnp.where(inside[None], values.astype(rows.dtype), out)
    return out


def _take_row_by_row(
    block: Float[Array, "t m k"], coordinates: Int[Array, " j"]
) -> Float[Array, "m j"]:
    """For a CPU, whose cache holds a row of a tile. All rows at once take 2 to 3 times as long."""
    tile, column = jnp.divmod(coordinates, block.shape[2])

    def take(row: Int[Array, ""]) -> Float[Array, " j"]:
        return block[tile, row, column]

    return lax.map(take, jnp.arange(block.shape[1], dtype=tile.dtype))


def _take_at_once(
    block: Float[Array, "t m k"], coordinates: Int[Array, " j"]
) -> Float[Array, "m j"]:
    # The barrier keeps XLA from computing the indices again for every row.
    tile, column = lax.optimization_barrier(jnp.divmod(coordinates, block.shape[2]))
    return block[tile, :, column].T


def _columns_of_tiles(
    block: Float[Array, "t m k"], start: int | Int[Array, ""], size: int
) -> Float[Array, "m size"]:
    count, rows, width = block.shape
    first: int | Array
    if isinstance(start, int):
        first = start // width
        touched = -(-(start + size) // width) - first
    else:
        # Columns can start anywhere in a tile, so they can touch one tile more.
        touched = min(-(-size // width) + 1, count)
        first = jnp.minimum(start // width, count - touched)
    tiles = lax.dynamic_slice_in_dim(block, first, touched, axis=0)
    tiles = lax.platform_dependent(tiles, cuda=_as_it_lies, default=lambda tiles: tiles)
    matrix = jnp.moveaxis(tiles, 0, 1).reshape(rows, touched * width)
    return lax.dynamic_slice_in_dim(matrix, start - first * width, size, axis=1)


def _as_it_lies(tiles: Float[Array, "t m k"]) -> Float[Array, "t m k"]:
    """Keeps the memory order of the tiles: in a loop XLA would copy the whole block to another."""
    return with_layout_constraint(tiles, MemoryLayout((0, 1, 2)))


def tiles_of(matrix: Float[Array, "m d"]) -> Float[Array, "t m k"]:
    """Cuts flattened gradients into tiles."""
    rows, size = matrix.shape
    count, width = tiling(size)
    padded = jnp.pad(matrix, ((0, 0), (0, count * width - size)))
    return jnp.moveaxis(padded.reshape(rows, count, width), 1, 0)


def tiling(size: int) -> tuple[int, int]:
    """The number and the width of the tiles of ``size`` columns."""
    count = max(-(-size // MAX_TILE), 1)
    if count == 1:
        return 1, size
    return count, -(-size // (count * _ALIGNMENT)) * _ALIGNMENT
