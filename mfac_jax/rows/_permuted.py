"""A view of rows with their coordinates in another order, without a copy."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import GradientRows
from mfac_jax.rows._view import RowsView


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PermutedRows(RowsView):
    """Gradients whose coordinates are put into an order. Implements :class:`GradientRows`.

    Its parameters are one vector. The order is data: another one compiles nothing anew.

    Attributes:
        base: the rows as they are stored.
        order: which coordinate of theirs each of the view's is; (d,).
        layout: one vector of d parameters (static).
    """

    base: GradientRows
    order: Int[Array, " d"]
    layout: Layout = field(metadata={"static": True})

    @classmethod
    def of(cls, rows: GradientRows, order: Int[Array, " d"]) -> PermutedRows:
        """The view of ``rows`` in this order."""
        return cls(rows, order, Layout(jax.ShapeDtypeStruct((rows.layout.size,), rows.dtype)))

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        return self.base.take(lax.dynamic_slice_in_dim(self.order, start, size))

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return self.base.take(self.order[coordinates])

    def to_base(self, tree: PyTree) -> PyTree:
        vector = jnp.asarray(tree)
        return self.base.layout.unflatten(
            jnp.zeros_like(vector).at[self.order].set(vector, unique_indices=True)
        )

    def from_base(self, tree: PyTree) -> PyTree:
        leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]
        return jnp.concatenate(leaves)[self.order]

    def mask_to_base(self, mask: PyTree | None) -> PyTree | None:
        if mask is None:
            return None
        (leaf,) = self.layout.check_mask(mask)
        return self.to_base(jnp.broadcast_to(leaf, self.order.shape))
