"""Several sets of rows as one, without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mfac_jax._layout import PyTree
from mfac_jax.rows._base import ColumnRows, GradientRows, check_columns, check_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedRows(ColumnRows):
    """The rows ``s_p g`` for all rows ``g`` of each part p.

    Attributes:
        parts: rows of the same parameters, in any storage. The columns of the stack can be read
            if the columns of every part can.
        scales: ``s``, one for each part; (p,).
        layout: the parameters that the gradients belong to.
        num_rows: the number of rows of all parts together (static).
        implementation: the implementation of the parts; None if they differ (static).
    """

    parts: tuple[GradientRows, ...]
    scales: Float[Array, " p"]
    layout: Any  # a Layout
    num_rows: int = field(metadata={"static": True})
    implementation: str | None = field(metadata={"static": True}, default=None)

    @classmethod
    def of(cls, parts: tuple[GradientRows, ...], scales: Float[Array, " p"]) -> StackedRows:
        """Stacks the parts in their order.

        Args:
            parts: at least one part.
            scales: ``s``, one for each part.

        Raises:
            TypeError: a part is not gradient rows.
            ValueError: two parts differ in the names or shapes of their parameters, or
                there are not as many scales as parts.
        """
        if not parts or jnp.shape(scales) != (len(parts),):
            raise ValueError(
                "stacked rows need at least one part and one scale for each part, "
                f"got {len(parts)} parts and scales of shape {jnp.shape(scales)}."
            )
        first = check_rows(parts[0])
        for part in parts:
            own, other = check_rows(part).layout, first.layout
            if (own.paths, own.shapes) != (other.paths, other.shapes):
                raise ValueError(
                    "stacked rows must have the same parameters: "
                    f"expected {other.describe()}, got {own.describe()}."
                )
        count = sum(part.num_rows for part in parts)
        names = {part.implementation for part in parts}
        name = names.pop() if len(names) == 1 else None
        dtype = functools.reduce(np.promote_types, [part.dtype for part in parts])
        return cls(parts, jnp.asarray(scales).astype(dtype), first.layout, count, name)

    @property
    def dtype(self) -> jnp.dtype:
        """The widest accumulation dtype of the parts."""
        return self.scales.dtype

    @property
    def is_traceable(self) -> bool:
        """Whether ``jit`` can trace every part."""
        return all(part.is_traceable for part in self.parts)

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return self._run(_dots, self._tree(vector))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        tree = None if vector is None else self._tree(vector)
        return self._run(_combine, coefficients, tree, scale)

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        own = tuple(part.gram(mask) for part in self.parts)
        if mask is not None:
            mask = jax.tree.unflatten(self.layout.treedef, self.layout.check_mask(mask))
        return self._run(_gram, own, mask)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return self._scaled([part.take(coordinates) for part in self._column_parts()])

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        return self._scaled([part.columns(start, size) for part in self._column_parts()])

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        if matrix is not None:
            return super().column_square_sums(matrix, lower=lower)
        return self._run(_column_square_sums)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(self, *arguments)``, as one program if ``jit`` can trace the parts."""
        return (_compiled(function) if self.is_traceable else function)(self, *arguments)

    def _tree(self, vector: PyTree) -> PyTree:
        leaves = map(jnp.asarray, self.layout.check(vector, "vector"))
        return jax.tree.unflatten(self.layout.treedef, leaves)

    def _column_parts(self) -> list[ColumnRows]:
        return [check_columns(part, "reading the columns of stacked rows") for part in self.parts]

    def _scaled(self, columns: list[Float[Array, "_ k"]]) -> Float[Array, "m k"]:
        scaled = [s * part.astype(s.dtype) for s, part in zip(self.scales, columns, strict=True)]
        return jnp.concatenate(scaled)


_compiled = functools.cache(jax.jit)


def _dots(rows: StackedRows, vector: PyTree) -> Float[Array, " m"]:
    dots = [part.dots(vector).astype(rows.dtype) for part in rows.parts]
    return jnp.concatenate([s * part for s, part in zip(rows.scales, dots, strict=True)])


def _combine(
    rows: StackedRows,
    coefficients: Float[Array, " m"],
    vector: PyTree | None,
    scale: Float[Array, ""] | None,
) -> PyTree:
    dtype, start, combined = rows.dtype, 0, []
    for s, part in zip(rows.scales, rows.parts, strict=True):
        own = s * coefficients[start : start + part.num_rows].astype(dtype)
        start += part.num_rows
        combined.append(part.combine(own.astype(part.dtype)))
    out = jax.tree.map(
        lambda *leaves: functools.reduce(jnp.add, [x.astype(dtype) for x in leaves]), *combined
    )
    if vector is not None:
        out = jax.tree.map(lambda v, x: v.astype(dtype) - x, vector, out)
    return out if scale is None else jax.tree.map(lambda x: x * scale.astype(dtype), out)


def _gram(
    rows: StackedRows, own: tuple[Float[Array, "_ _"], ...], mask: PyTree | None
) -> Float[Array, "m m"]:
    """The Gram matrix from its diagonal blocks; the products below them are computed here."""
    lines, left, dtype = [], 0, rows.dtype
    for i, block in enumerate(own):
        left += len(block)
        beside = [rows.parts[i].products(other, mask) for other in rows.parts[:i]]
        line = [rows.scales[j] * part.astype(dtype) for j, part in enumerate([*beside, block])]
        line.append(jnp.zeros((len(block), rows.num_rows - left), dtype))
        lines.append(rows.scales[i] * jnp.concatenate(line, axis=1))
    lower = jnp.concatenate(lines)
    # Blocks on the diagonal are symmetric to the last bit.
    return jnp.tril(lower) + jnp.tril(lower, -1).T


def _column_square_sums(rows: StackedRows) -> PyTree:
    """``sum_p s_p^2 q_p`` for the column square sums ``q_p`` of the parts."""
    parts = [part.column_square_sums() for part in rows.parts]

    def of_leaf(*leaves: Array) -> Array:
        pairs = zip(rows.scales, leaves, strict=True)
        return functools.reduce(jnp.add, [s**2 * leaf.astype(rows.dtype) for s, leaf in pairs])

    return jax.tree.map(of_leaf, *parts)
