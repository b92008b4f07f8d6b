"""Rows as one dense (m, d) block of flattened gradients: one launch a scan."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import is_small_enough


class FlatRows(NamedTuple):
    """Gradients flattened and stacked. Implements :class:`GradientRows`.

    Attributes:
        block: ``G``; (m, d), float32, bfloat16 or float64.
        layout: the parameters the gradients belong to (static).
    """

    block: Float[Array, "m d"]
    layout: Layout

    @property
    def num_rows(self) -> int:
        return self.block.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        return kernels.accumulation_dtype(self.block.dtype)

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[FlatRows, Float[Array, " m"], Bool[Array, ""]]:
        vector = self.layout.flatten(gradient, self.block.dtype, "gradient")
        wide = vector.astype(self.dtype)
        accepted = is_small_enough(jnp.sum(wide * wide), self.num_rows)
        block, dots = kernels.write_row(self.block, row, vector, accepted)
        return self._replace(block=block), dots, accepted

    def clear(self, row: Int[Array, ""]) -> FlatRows:
        return self._replace(block=self.block.at[row].set(0))

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return kernels.dots(self.block, self.layout.flatten(vector, self.dtype, "vector"))

    def combine(self, coefficients: Float[Array, " m"]) -> PyTree:
        return self.layout.unflatten(kernels.combine(self.block, coefficients))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return kernels.gram(self.block, None if mask is None else self._flat_mask(mask))

    def restrict(self, mask: PyTree) -> FlatRows:
        keep = self._flat_mask(mask)
        return self._replace(block=jnp.where(keep[None], self.block, jnp.zeros_like(self.block)))

    def transform(self, matrix: Float[Array, "k m"]) -> FlatRows:
        return self._replace(block=kernels.transform(self.block, matrix))

    def column_square_sums(self, matrix: Float[Array, "k m"] | None = None) -> PyTree:
        return self.layout.unflatten(kernels.column_square_sums(self.block, matrix))

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        return lax.dynamic_slice_in_dim(self.block, start, size, axis=1).astype(self.dtype)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return self.block[:, coordinates].astype(self.dtype)

    def _flat_mask(self, mask: PyTree) -> Bool[Array, " d"]:
        leaves = self.layout.check_mask(mask)
        return (
            jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]) if leaves else jnp.ones(0, bool)
        )
