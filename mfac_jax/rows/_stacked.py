"""Several sets of rows, one under another, without a copy."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import ColumnRows, GradientRows, check_columns

# Rows of one part that are multiplied with all of another at a time: few beside the gradients,
# enough for a matrix product.
_ROWS_AT_A_TIME = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedRows(ColumnRows):
    """The rows ``s_p g`` for all rows ``g`` of each part p.

    Attributes:
        parts: rows of the same parameters and accumulation dtype. The columns of the stack can
            be read if those of every part can.
        scales: ``s``, one a part; (p,).
        layout: the parameters that the gradients belong to (static).
        num_rows: the number of rows of all parts together (static).
        implementation: that of the parts; None if they differ (static).
    """

    parts: tuple[GradientRows, ...]
    scales: Float[Array, " p"]
    layout: Layout = field(metadata={"static": True})
    num_rows: int = field(metadata={"static": True})
    implementation: str | None = field(metadata={"static": True}, default=None)

    @classmethod
    def of(cls, parts: tuple[GradientRows, ...], scales: Float[Array, " p"]) -> StackedRows:
        """Stacks the parts in their order.

        Args:
            parts: one part or more.
            scales: ``s``, one a part.

        Raises:
            ValueError: two parts differ in their parameters or their accumulation dtype, or
                there are not as many scales as parts.
        """
        if not parts or jnp.shape(scales) != (len(parts),):
            raise ValueError(
                "stacked rows need one scale for each of one part or more, "
                f"got {len(parts)} parts and scales of shape {jnp.shape(scales)}."
            )
        first = parts[0]
        for part in parts:
            if (part.layout, part.dtype) != (first.layout, first.dtype):
                raise ValueError(
                    "stacked rows must have the same parameters and accumulation dtype: "
                    f"expected {first.layout.describe()} in {first.dtype.name}, "
                    f"got {part.layout.describe()} in {part.dtype.name}."
                )
        count = sum(part.num_rows for part in parts)
        names = {part.implementation for part in parts}
        name = names.pop() if len(names) == 1 else None
        return cls(parts, jnp.asarray(scales, first.dtype), first.layout, count, name)

    @property
    def dtype(self) -> jnp.dtype:
        """The accumulation dtype of the parts."""
        return self.parts[0].dtype

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        return _dots(self.scales, tuple(part.dots(vector) for part in self.parts))

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        cuts = np.cumsum([part.num_rows for part in self.parts])[:-1].tolist()
        own = _cut(self.scales, coefficients, cuts=tuple(cuts))
        out = vector
        for i, (part, c) in enumerate(zip(self.parts, own, strict=True)):
            if vector is not None:
                is_last = i + 1 == len(self.parts)
                out = part.combine(c, vector=out, scale=scale if is_last else None)
            else:
                combined = part.combine(c, scale=scale)
                out = combined if out is None else _add(out, combined)
        return out

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        own = tuple(part.gram(mask) for part in self.parts)
        beside = tuple(
            _products(part, other, mask)
            for i, part in enumerate(self.parts)
            for other in self.parts[:i]
        )
        return _put_together(self.scales, own, beside)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        return self._scaled([part.take(coordinates) for part in self._column_parts()])

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        return self._scaled([part.columns(start, size) for part in self._column_parts()])

    def _column_parts(self) -> list[ColumnRows]:
        return [check_columns(part, "reading the columns of stacked rows") for part in self.parts]

    def _scaled(self, columns: list[Float[Array, "_ k"]]) -> Float[Array, "m k"]:
        return jnp.concatenate([s * part for s, part in zip(self.scales, columns, strict=True)])


@jax.jit
def _dots(scales: Float[Array, " p"], parts: tuple[Array, ...]) -> Float[Array, " m"]:
    return jnp.concatenate([scales[i] * part for i, part in enumerate(parts)])


@functools.partial(jax.jit, static_argnames="cuts")
def _cut(
    scales: Float[Array, " p"], coefficients: Float[Array, " m"], *, cuts: tuple[int, ...]
) -> list[Array]:
    return [scales[i] * part for i, part in enumerate(jnp.split(coefficients, cuts))]


@jax.jit
def _add(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, y)


@jax.jit
def _products(
    first: GradientRows, second: GradientRows, mask: PyTree | None
) -> Float[Array, "n k"]:
    """``G_1 G_2^T`` by products alone, some rows of the first at a time."""

    def row(unit: Float[Array, " n"]) -> Float[Array, " k"]:
        gradient = first.combine(unit)
        if mask is not None:
            gradient = jax.tree.map(
                lambda g, keep: jnp.where(keep, g, jnp.zeros_like(g)), gradient, mask
            )
        return second.dots(gradient)

    units = jnp.eye(first.num_rows, dtype=first.dtype)
    return lax.map(row, units, batch_size=min(_ROWS_AT_A_TIME, first.num_rows))


@jax.jit
def _put_together(
    scales: Float[Array, " p"], own: tuple[Array, ...], beside: tuple[Array, ...]
) -> Float[Array, "m m"]:
    """The Gram matrix from the blocks on its diagonal and those below it, row by row."""
    rows = []
    below = iter(beside)
    left = 0
    total = sum(len(block) for block in own)
    for i, block in enumerate(own):
        parts = [scales[j] * next(below) for j in range(i)]
        parts.append(scales[i] * block)
        left += len(block)
        parts.append(jnp.zeros((len(block), total - left), block.dtype))
        rows.append(scales[i] * jnp.concatenate(parts, axis=1))
    lower = jnp.concatenate(rows)
    # Blocks on the diagonal are symmetric to the last bit.
    return jnp.tril(lower) + jnp.tril(lower, -1).T
