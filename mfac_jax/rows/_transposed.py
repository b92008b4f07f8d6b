"""A view of rows whose parameters have their axes in another order, without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import GradientRows
from mfac_jax.rows._view import RowsView

Orders = tuple[tuple[int, ...], ...]


def transposed(leaves: Sequence[Array], orders: Orders) -> tuple[Array, ...]:
    """Every leaf with its axes in the given order."""
    return tuple(jnp.transpose(leaf, order) for leaf, order in zip(leaves, orders, strict=True))


def transposed_back(leaves: Sequence[Array], orders: Orders) -> tuple[Array, ...]:
    """What :func:`transposed` has made of leaves, as they were."""
    return transposed(leaves, tuple(_inverse(order) for order in orders))


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=lambda i: order[i]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedRows(RowsView):
    """Gradients of transposed parameters. Implements :class:`GradientRows`.

    Every product is asked of the rows behind it with the vectors turned back, so no
    gradient is moved; only ``columns`` and ``take`` copy what is asked of them.

    Attributes:
        base: the rows as they are stored.
        orders: the axes of every leaf in their new order (static).
        layout: the transposed parameters (static).
    """

    base: GradientRows
    orders: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})

    @classmethod
    def of(cls, rows: GradientRows, orders: tuple[tuple[int, ...], ...]) -> TransposedRows:
        """The view of ``rows`` with the axes of its parameters in these orders."""
        leaves = [
            jax.ShapeDtypeStruct(tuple(shape[axis] for axis in order), dtype)
            for shape, dtype, order in zip(
                rows.layout.shapes, rows.layout.dtypes, orders, strict=True
            )
        ]
        return cls(rows, orders, Layout(jax.tree.unflatten(rows.layout.treedef, leaves)))

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        if not isinstance(start, int):
            return self.take(start + jnp.arange(size, dtype=jnp.int32))
        parts, first = [jnp.zeros((self.num_rows, 0), self.dtype)], 0
        for shape, order, width in zip(
            self.base.layout.shapes, self.orders, self.layout.sizes, strict=True
        ):
            low, high = max(start - first, 0), min(start + size - first, width)
            if low < high:
                stored = self.base.columns(first, width).reshape(self.num_rows, *shape)
                # Only the slices along the new first axis that have such columns in them.
                span = width // shape[order[0]] if order else 1
                begin, end = low // span, -(-high // span)
                if order:
                    stored = lax.slice_in_dim(stored, begin, end, axis=order[0] + 1)
                turned = jnp.transpose(stored, (0, *(axis + 1 for axis in order)))
                flat = turned.reshape(self.num_rows, (end - begin) * span)
                parts.append(flat[:, low - begin * span : high - begin * span])
            first += width
        return jnp.concatenate(parts, axis=1)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        sizes = np.asarray(self.layout.sizes, int)
        starts = np.cumsum(sizes) - sizes
        leaf = jnp.searchsorted(jnp.asarray(starts[sizes > 0]), coordinates, side="right") - 1
        rank = max((len(order) for order in self.orders), default=0)
        # A coordinate is start + sum of index times stride, here and in the stored order.
        here, there = np.ones((2, len(sizes), rank), int)
        extent = np.ones((len(sizes), rank), int)
        for i, (order, shape) in enumerate(zip(self.orders, self.layout.shapes, strict=True)):
            stored = self.base.layout.shapes[i]
            for k, axis in enumerate(order):
                extent[i, k] = shape[k]
                here[i, k] = math.prod(shape[k + 1 :])
                there[i, k] = math.prod(stored[axis + 1 :])
        here, there, extent = here[sizes > 0], there[sizes > 0], extent[sizes > 0]
        first = jnp.asarray(starts[sizes > 0])[leaf]
        rest, stored_at = coordinates - first, first
        for k in range(rank):
            index = rest // jnp.asarray(here[:, k])[leaf] % jnp.asarray(extent[:, k])[leaf]
            stored_at = stored_at + index * jnp.asarray(there[:, k])[leaf]
        return self.base.take(lax.optimization_barrier(stored_at))

    def to_base(self, tree: PyTree) -> PyTree:
        return self._each(tree, transposed_back)

    def from_base(self, tree: PyTree) -> PyTree:
        return self._each(tree, transposed)

    def mask_to_base(self, mask: PyTree | None) -> PyTree | None:
        if mask is None:
            return None
        leaves = self.layout.check_mask(mask)
        return self.to_base(jax.tree.unflatten(self.layout.treedef, leaves))

    def _each(
        self, tree: PyTree, function: Callable[[list[Array], Orders], tuple[Array, ...]]
    ) -> PyTree:
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        return jax.tree.unflatten(self.layout.treedef, function(leaves, self.orders))
