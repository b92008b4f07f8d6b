"""Rows as one dense ``(m, *shape)`` block a parameter.

Each block can carry the sharding of its parameter behind an unsharded leading
axis, so a step of the optimizer never gathers sharded parameters: the devices only
exchange the m numbers of a product. (A Gram matrix of sharded leaves does gather.)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import kernels
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import Implementation, is_small_enough


class PerLeafRows(NamedTuple):
    """Gradients stacked leaf by leaf. Implements :class:`GradientRows`.

    Attributes:
        blocks: the tree of the parameters with a leaf ``(m, *shape)`` for each of theirs.
        slots: m zero bytes; they say how many rows there are when there is no leaf.
        layout: the parameters the gradients belong to (static).
        implementation: of the scans (static).
    """

    blocks: PyTree
    slots: Bool[Array, " m"]
    layout: Layout
    implementation: Implementation = Implementation()

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(self.blocks)]
        return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[PerLeafRows, Float[Array, " m"], Bool[Array, ""]]:
        blocks, treedef = jax.tree.flatten(self.blocks)
        stored, accepted = self._gradient(gradient)
        pairs = [
            kernels.write_row(
                b[None], row, g[None], accepted, implementation=self.implementation.name
            )
            for b, g in zip(blocks, stored, strict=True)
        ]
        dots = self._total(lambda pair: pair[1], pairs, (self.num_rows,))
        blocks = jax.tree.unflatten(treedef, [block[0] for block, _ in pairs])
        return self._replace(blocks=blocks), dots, accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[PerLeafRows, Bool[Array, ""]]:
        blocks, treedef = jax.tree.flatten(self.blocks)
        stored, accepted = self._gradient(gradient)
        written = [
            kernels.set_row(b[None], row, g[None], accepted)[0]
            for b, g in zip(blocks, stored, strict=True)
        ]
        return self._replace(blocks=jax.tree.unflatten(treedef, written)), accepted

    def clear(self, row: Int[Array, ""]) -> PerLeafRows:
        return self._replace(blocks=jax.tree.map(lambda b: b.at[row].set(0), self.blocks))

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        pairs = zip(jax.tree.leaves(self.blocks), self.layout.check(vector, "vector"), strict=True)
        return self._total(
            lambda pair: kernels.dots(
                pair[0][None],
                jnp.asarray(pair[1])[None],
                implementation=self.implementation.name,
            ),
            list(pairs),
            (self.num_rows,),
        )

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        blocks, treedef = jax.tree.flatten(self.blocks)
        vectors: list[Array | None] = [None] * len(blocks)
        if vector is not None:
            vectors = [jnp.asarray(v)[None] for v in self.layout.check(vector, "vector")]
        combined = [
            kernels.combine(
                b[None],
                coefficients,
                vector=v,
                scale=scale,
                dtype=self.dtype,
                implementation=self.implementation.name,
            )[0]
            for b, v in zip(blocks, vectors, strict=True)
        ]
        return jax.tree.unflatten(treedef, combined)

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        blocks = jax.tree.leaves(self.blocks)
        masks = [None] * len(blocks) if mask is None else self.layout.check_mask(mask)
        return self._total(
            lambda pair: kernels.gram(pair[0][None], None if pair[1] is None else pair[1][None]),
            list(zip(blocks, masks, strict=True)),
            (self.num_rows, self.num_rows),
        )

    def restrict(self, mask: PyTree) -> PerLeafRows:
        blocks, treedef = jax.tree.flatten(self.blocks)
        kept = [
            jnp.where(keep[None], block, jnp.zeros_like(block))
            for block, keep in zip(blocks, self.layout.check_mask(mask), strict=True)
        ]
        return self._replace(blocks=jax.tree.unflatten(treedef, kept))

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> PerLeafRows:
        return self._replace(
            blocks=jax.tree.map(
                lambda b: kernels.transform(b[None], matrix, lower=lower)[0].astype(self.dtype),
                self.blocks,
            ),
            slots=jnp.zeros(matrix.shape[0], bool),
        )

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        return jax.tree.map(
            lambda b: kernels.column_square_sums(b[None], matrix, lower=lower)[0].astype(
                self.dtype
            ),
            self.blocks,
        )

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        if not isinstance(start, int):
            return self.take(start + jnp.arange(size))
        parts, offset = [], 0
        for block, width in zip(jax.tree.leaves(self.blocks), self.layout.sizes, strict=True):
            first, last = max(start - offset, 0), min(start + size - offset, width)
            if first < last:
                matrix = block.reshape(self.num_rows, width)
                parts.append(matrix[:, first:last].astype(self.dtype))
            offset += width
        return jnp.concatenate(parts, axis=1)

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        out = jnp.zeros((self.num_rows, coordinates.shape[0]), self.dtype)
        starts = np.cumsum((0, *self.layout.sizes))
        blocks = jax.tree.leaves(self.blocks)
        for block, start, width in zip(blocks, starts, self.layout.sizes, strict=False):
            if width:
                local = coordinates - int(start)
                values = block.reshape(self.num_rows, width)[:, jnp.clip(local, 0, width - 1)]
                inside = (local >= 0) & (local < width)
                out = jnp.where(inside[None], values.astype(self.dtype), out)
        return out

    def _gradient(self, gradient: PyTree) -> tuple[list[Array], Bool[Array, ""]]:
        """The leaves of a gradient as they are stored, and whether it is accepted."""
        leaves = self.layout.check(gradient, "gradient")
        blocks = jax.tree.leaves(self.blocks)
        stored = [jnp.asarray(g).astype(b.dtype) for b, g in zip(blocks, leaves, strict=True)]
        norm = self._total(lambda g: jnp.sum(g.astype(self.dtype) ** 2), stored)
        return stored, is_small_enough(norm, self.num_rows)

    def _total(
        self, term: Callable[[Any], Array], items: list[Any], shape: tuple[int, ...] = ()
    ) -> Array:
        terms = [term(item).astype(self.dtype) for item in items]
        return functools.reduce(operator.add, terms, jnp.zeros(shape, self.dtype))
