"""A view of rows whose parameters have their axes in another order, without a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import GradientRows, Implementation


def inverse_order(order: Sequence[int]) -> tuple[int, ...]:
    """The order of axes that undoes a transposition."""
    return tuple(sorted(range(len(order)), key=lambda i: order[i]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedRows:
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

    @property
    def implementation(self) -> Implementation:
        return self.base.implementation

    @property
    def num_rows(self) -> int:
        return self.base.num_rows

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[TransposedRows, Float[Array, " m"], Bool[Array, ""]]:
        self.layout.check(gradient, "gradient")
        base, dots, accepted = self.base.put(row, self._back(gradient))
        return TransposedRows(base, self.orders, self.layout), dots, accepted

    def write(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[TransposedRows, Bool[Array, ""]]:
        self.layout.check(gradient, "gradient")
        base, accepted = self.base.write(row, self._back(gradient))
        return TransposedRows(base, self.orders, self.layout), accepted

    def clear(self, row: Int[Array, ""]) -> TransposedRows:
        return TransposedRows(self.base.clear(row), self.orders, self.layout)

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        self.layout.check(vector, "vector")
        return self.base.dots(self._back(vector))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        if vector is not None:
            self.layout.check(vector, "vector")
            vector = self._back(vector)
        return self._turn(self.base.combine(coefficients, vector=vector, scale=scale))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return self.base.gram(None if mask is None else self._mask(mask))

    def restrict(self, mask: PyTree) -> TransposedRows:
        return TransposedRows(self.base.restrict(self._mask(mask)), self.orders, self.layout)

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> TransposedRows:
        return TransposedRows(self.base.transform(matrix, lower=lower), self.orders, self.layout)

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        return self._turn(self.base.column_square_sums(matrix, lower=lower))

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
                turned = jnp.transpose(stored, (0, *(axis + 1 for axis in order)))
                parts.append(turned.reshape(self.num_rows, width)[:, low:high])
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
        return self.base.take(stored_at)

    def _turn(self, tree: PyTree) -> PyTree:
        return self._each(tree, lambda leaf, order: jnp.transpose(leaf, order))

    def _back(self, tree: PyTree) -> PyTree:
        return self._each(tree, lambda leaf, order: jnp.transpose(leaf, inverse_order(order)))

    def _mask(self, mask: PyTree) -> PyTree:
        leaves = self.layout.check_mask(mask)
        return self._back(jax.tree.unflatten(self.layout.treedef, leaves))

    def _each(self, tree: PyTree, function: Callable[[Array, tuple[int, ...]], Array]) -> PyTree:
        leaves = zip(jax.tree.leaves(tree), self.orders, strict=True)
        turned = [function(jnp.asarray(leaf), order) for leaf, order in leaves]
        return jax.tree.unflatten(self.layout.treedef, turned)
