"""Rows as one dense block of flattened gradients: one launch a scan."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax import kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import Implementation, is_small_enough

# Tiles are as many columns wide as the vector units of a GPU or a TPU want them aligned.
_ALIGNMENT = 128


class FlatRows(NamedTuple):
    """Gradients flattened, cut into tiles and stacked. Implements :class:`GradientRows`.

    The last tile is padded with zeros. A scan reads the block from end to end.

    Attributes:
        block: ``G``, a tile of its columns after the other; (t, m, k) with ``t k >= d``,
            float32, bfloat16 or float64.
        layout: the parameters the gradients belong to (static).
        implementation: of the scans (static).
    """

    block: Float[Array, "t m k"]
    layout: Layout
    implementation: Implementation = Implementation()

    @classmethod
    def of(
        cls, matrix: Float[Array, "m d"], layout: Layout, implementation: Implementation
    ) -> FlatRows:
        """The rows of a matrix."""
        rows, size = matrix.shape
        count, width = tiling(size)
        padded = jnp.pad(matrix, ((0, 0), (0, count * width - size)))
        block = jnp.moveaxis(padded.reshape(rows, count, width), 1, 0)
        return cls(block, layout, implementation)

    @property
    def num_rows(self) -> int:
        return self.block.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        return kernels.accumulation_dtype(self.block.dtype)

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[FlatRows, Float[Array, " m"], Bool[Array, ""]]:
        vector, accepted = self._gradient(gradient)
        block, dots = kernels.write_row(
            self.block, row, vector, accepted, implementation=self.implementation.name
        )
        return self._replace(block=block), dots, accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[FlatRows, Bool[Array, ""]]:
        vector, accepted = self._gradient(gradient)
        block = kernels.set_row(self.block, row, vector, accepted)
        return self._replace(block=block), accepted

    def clear(self, row: Int[Array, ""]) -> FlatRows:
        return self._replace(block=self.block.at[:, row].set(0))

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return kernels.dots(
            self.block,
            self._tiles(self.layout.flatten(vector, self.dtype, "vector")),
            implementation=self.implementation.name,
        )

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        tiles = None
        if vector is not None:
            tiles = self._tiles(self.layout.flatten(vector, self.dtype, "vector"))
        return self._tree(
            kernels.combine(
                self.block,
                coefficients,
                vector=tiles,
                scale=scale,
                implementation=self.implementation.name,
            )
        )

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return kernels.gram(self.block, None if mask is None else self._mask(mask))

    def restrict(self, mask: PyTree) -> FlatRows:
        keep = self._mask(mask)[:, None]
        return self._replace(block=jnp.where(keep, self.block, jnp.zeros_like(self.block)))

    def squares(self, mask: PyTree) -> Float[Array, " m"]:
        """``|g_i|^2`` over the coordinates where ``mask`` is true."""
        wide = self.block.astype(self.dtype)
        return jnp.sum(jnp.where(self._mask(mask)[:, None], wide * wide, 0), axis=(0, 2))

    def scale(self, factors: Float[Array, " m"]) -> FlatRows:
        """The rows ``factors_i g_i``."""
        scaled = self.block * factors.astype(self.block.dtype)[None, :, None]
        return self._replace(block=scaled)

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> FlatRows:
        return self._replace(block=kernels.transform(self.block, matrix, lower=lower))

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        return self._tree(kernels.column_square_sums(self.block, matrix, lower=lower))

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        count, rows, width = self.block.shape
        first: int | Array
        if isinstance(start, int):
            first = start // width
            touched = -(-(start + size) // width) - first
        else:
            # Wherever they start, columns reach one tile further than as many could.
            touched = min(-(-size // width) + 1, count)
            first = jnp.minimum(start // width, count - touched)
        tiles = lax.dynamic_slice_in_dim(self.block, first, touched, axis=0)
        tiles = lax.platform_dependent(tiles, cuda=_as_it_lies, default=lambda tiles: tiles)
        matrix = jnp.moveaxis(tiles, 0, 1).reshape(rows, touched * width)
        columns = lax.dynamic_slice_in_dim(matrix, start - first * width, size, axis=1)
        return columns.astype(self.dtype)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        # Behind a barrier, so that no number is worked out once a row.
        tile, column = lax.optimization_barrier(jnp.divmod(coordinates, self.block.shape[2]))
        return self.block[tile, :, column].T.astype(self.dtype)

    def _gradient(self, gradient: PyTree) -> tuple[Float[Array, "t k"], Bool[Array, ""]]:
        flat = self.layout.flatten(gradient, self.block.dtype, "gradient")
        wide = flat.astype(self.dtype)
        accepted = is_small_enough(jnp.sum(wide * wide), self.num_rows)
        return self._tiles(flat), accepted

    def _tiles(self, vector: Shaped[Array, " d"]) -> Shaped[Array, "t k"]:
        count, _, width = self.block.shape
        return jnp.pad(vector, (0, count * width - vector.size)).reshape(count, width)

    def _tree(self, tiles: Float[Array, "t k"]) -> PyTree:
        return self.layout.unflatten(tiles.reshape(-1)[: self.layout.size])

    def _mask(self, mask: PyTree) -> Bool[Array, "t k"]:
        leaves = [jnp.ravel(leaf) for leaf in self.layout.check_mask(mask)]
        return self._tiles(jnp.concatenate([*leaves, jnp.zeros(0, bool)]))


def _as_it_lies(tiles: Float[Array, "t m k"]) -> Float[Array, "t m k"]:
    """Tiles row by row: in a loop XLA would copy the whole block to another order."""
    return with_layout_constraint(tiles, MemoryLayout((0, 1, 2)))


def tiling(size: int) -> tuple[int, int]:
    """How many tiles ``size`` columns are cut into, and how wide they are."""
    count = max(-(-size // kernels.MAX_TILE), 1)
    if count == 1:
        return 1, size
    return count, -(-size // (count * _ALIGNMENT)) * _ALIGNMENT
