"""Several sets of rows as one, without a copy."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import ColumnRows, GradientRows, check_columns, check_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedRows(ColumnRows):
    """The rows ``s_p g`` for all rows ``g`` of each part p.

    Attributes:
        parts: rows of the same parameters, in any storage. The columns of the stack can be read
            if the columns of every part can.
        scales: ``s``, one for each part; (p,).
        layout: the parameters that the gradients belong to (static).
        num_rows: the number of rows of all parts together (static).
        implementation: the implementation of the parts; None if they differ (static).
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
        combined = [
            part.combine(c.astype(part.dtype)) for part, c in zip(self.parts, own, strict=True)
        ]
        return _finished(self.layout, combined, vector, scale, dtype=self.dtype)

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        own = tuple(part.gram(mask) for part in self.parts)
        beside = tuple(
            part.products(other, mask)
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
        scaled = [s * part.astype(s.dtype) for s, part in zip(self.scales, columns, strict=True)]
        return jnp.concatenate(scaled)


@jax.jit
def _dots(scales: Float[Array, " p"], parts: tuple[Array, ...]) -> Float[Array, " m"]:
    return jnp.concatenate([scales[i] * part.astype(scales.dtype) for i, part in enumerate(parts)])


@functools.partial(jax.jit, static_argnames="cuts")
def _cut(
    scales: Float[Array, " p"], coefficients: Float[Array, " m"], *, cuts: tuple[int, ...]
) -> list[Array]:
    parts = jnp.split(coefficients.astype(scales.dtype), cuts)
    return [scales[i] * part for i, part in enumerate(parts)]


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def _finished(
    layout: Layout,
    parts: list[PyTree],
    vector: PyTree | None,
    scale: Float[Array, ""] | None,
    *,
    dtype: jnp.dtype,
) -> PyTree:
    """``scale G^T c`` or ``scale (v - G^T c)``, from the combinations of the parts."""
    columns = zip(*map(jax.tree.leaves, parts), strict=True)
    out = [functools.reduce(jnp.add, [x.astype(dtype) for x in column]) for column in columns]
    if vector is not None:
        pairs = zip(jax.tree.leaves(vector), out, strict=True)
        out = [jnp.asarray(v).astype(dtype) - x for v, x in pairs]
    if scale is not None:
        out = [x * scale.astype(dtype) for x in out]
    return jax.tree.unflatten(layout.treedef, out)


@jax.jit
def _put_together(
    scales: Float[Array, " p"], own: tuple[Array, ...], beside: tuple[Array, ...]
) -> Float[Array, "m m"]:
    """The Gram matrix from its diagonal blocks and, row by row, the blocks below them."""
    rows = []
    below = iter(beside)
    left = 0
    total = sum(len(block) for block in own)
    for i, block in enumerate(own):
        parts = [scales[j] * next(below).astype(scales.dtype) for j in range(i)]
        parts.append(scales[i] * block.astype(scales.dtype))
        left += len(block)
        parts.append(jnp.zeros((len(block), total - left), scales.dtype))
        rows.append(scales[i] * jnp.concatenate(parts, axis=1))
    lower = jnp.concatenate(rows)
    # Blocks on the diagonal are symmetric to the last bit.
    return jnp.tril(lower) + jnp.tril(lower, -1).T
