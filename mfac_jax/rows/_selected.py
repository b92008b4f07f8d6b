"""A view of rows that leaves some parameters out, without a copy of the gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import GradientRows
from mfac_jax.rows._view import RowsView


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelectedRows(RowsView):
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

    def to_base(self, tree: PyTree) -> PyTree:
        """All parameters, with zeros in the leaves that are left out.

        So a row that is written is zero in the leaves that the view does not show.
        """
        layout, selected = self.base.layout, iter(jax.tree.leaves(tree))
        wide = [
            jnp.asarray(next(selected)) if kept else jnp.zeros(shape, self.dtype)
            for shape, kept in zip(layout.shapes, self.keep, strict=True)
        ]
        return jax.tree_util.tree_unflatten(layout.treedef, wide)

    def from_base(self, tree: PyTree) -> PyTree:
        leaves = zip(jax.tree.leaves(tree), self.keep, strict=True)
        return tuple(leaf for leaf, kept in leaves if kept)

    def mask_to_base(self, mask: PyTree | None) -> PyTree:
        leaves = [True] * sum(self.keep) if mask is None else self.layout.check_mask(mask)
        selected = iter(leaves)
        wide = [jnp.asarray(next(selected) if kept else False) for kept in self.keep]
        return jax.tree_util.tree_unflatten(self.base.layout.treedef, wide)
