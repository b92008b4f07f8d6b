"""A view of rows that leaves some parameters out, without a copy of the gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import GradientRows, Implementation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelectedRows:
    """The gradients of some of the parameters. Implements :class:`GradientRows`.

    Its parameters are the selected leaves, as a tuple in their order; its coordinates
    are theirs, numbered without gaps. Every product is asked of the rows behind it,
    so nothing is stored twice and any storage will do.

    Attributes:
        base: the rows of all parameters.
        keep: for every leaf of theirs, whether it is selected (static).
        layout: the selected parameters (static).
    """

    base: GradientRows
    keep: tuple[bool, ...] = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})

    @classmethod
    def of(cls, rows: GradientRows, keep: tuple[bool, ...]) -> SelectedRows:
        """The view of the leaves of ``rows`` where ``keep`` is true."""
        shapes = zip(rows.layout.shapes, rows.layout.dtypes, keep, strict=True)
        leaves = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, kept in shapes if kept)
        return cls(rows, keep, Layout(leaves))

    @property
    def implementation(self) -> Implementation:
        return self.base.implementation

    @property
    def num_rows(self) -> int:
        return self.base.num_rows

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    # A row that is written is zero in the leaves that the view does not show.
    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[SelectedRows, Float[Array, " m"], Bool[Array, ""]]:
        leaves = [jnp.asarray(leaf) for leaf in self.layout.check(gradient, "gradient")]
        base, dots, accepted = self.base.put(row, self._widen(leaves))
        return SelectedRows(base, self.keep, self.layout), dots, accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[SelectedRows, Bool[Array, ""]]:
        leaves = [jnp.asarray(leaf) for leaf in self.layout.check(gradient, "gradient")]
        base, accepted = self.base.write(row, self._widen(leaves))
        return SelectedRows(base, self.keep, self.layout), accepted

    def clear(self, row: Int[Array, ""]) -> SelectedRows:
        return SelectedRows(self.base.clear(row), self.keep, self.layout)

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        leaves = [jnp.asarray(leaf) for leaf in self.layout.check(vector, "vector")]
        return self.base.dots(self._widen(leaves))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        if vector is not None:
            leaves = self.layout.check(vector, "vector")
            vector = self._widen([jnp.asarray(leaf) for leaf in leaves])
        return self._narrow(self.base.combine(coefficients, vector=vector, scale=scale))

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        return self.base.gram(self._widen_mask(mask))

    def restrict(self, mask: PyTree) -> SelectedRows:
        return SelectedRows(self.base.restrict(self._widen_mask(mask)), self.keep, self.layout)

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> SelectedRows:
        base = self.base.transform(matrix, lower=lower)
        return SelectedRows(base, self.keep, self.layout)

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        return self._narrow(self.base.column_square_sums(matrix, lower=lower))

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        if not isinstance(start, int):
            return self.take(start + jnp.arange(size))
        parts = [jnp.zeros((self.num_rows, 0), self.dtype)]
        for first, shift, width in self._segments():
            low, high = max(start, first), min(start + size, first + width)
            if low < high:
                parts.append(self.base.columns(low + shift, high - low))
        return jnp.concatenate(parts, axis=1)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        segments = self._segments()
        firsts = jnp.asarray([first for first, _, _ in segments], coordinates.dtype)
        shifts = jnp.asarray([shift for _, shift, _ in segments], coordinates.dtype)
        segment = jnp.searchsorted(firsts, coordinates, side="right") - 1
        return self.base.take(coordinates + shifts[segment])

    def _segments(self) -> list[tuple[int, int, int]]:
        """Neighbouring selected leaves: first coordinate here, offset to base, width."""
        sizes = np.asarray(self.base.layout.sizes, int)
        keep = np.asarray(self.keep, bool)
        there = np.cumsum(sizes) - sizes
        here = np.cumsum(sizes * keep) - sizes * keep
        segments: list[tuple[int, int, int]] = []
        for first, shift, width in zip(here[keep], (there - here)[keep], sizes[keep], strict=True):
            if segments and segments[-1][1] == shift:
                start, _, before = segments.pop()
                segments.append((start, int(shift), before + int(width)))
            elif width:
                segments.append((int(first), int(shift), int(width)))
        return segments

    def _widen(self, leaves: list[Any]) -> PyTree:
        """The tree of all parameters, with zeros in the leaves that are left out."""
        layout, selected = self.base.layout, iter(leaves)
        wide = [
            next(selected) if kept else jnp.zeros(shape, self.dtype)
            for shape, kept in zip(layout.shapes, self.keep, strict=True)
        ]
        return jax.tree_util.tree_unflatten(layout.treedef, wide)

    def _widen_mask(self, mask: PyTree | None) -> PyTree:
        leaves = [True] * sum(self.keep) if mask is None else self.layout.check_mask(mask)
        selected = iter(leaves)
        wide = [jnp.asarray(next(selected) if kept else False) for kept in self.keep]
        return jax.tree_util.tree_unflatten(self.base.layout.treedef, wide)

    def _narrow(self, tree: PyTree) -> PyTree:
        leaves = zip(jax.tree.leaves(tree), self.keep, strict=True)
        return tuple(leaf for leaf, kept in leaves if kept)
