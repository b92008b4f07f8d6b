"""The n x n algebra and the element-wise work of the whole inverse, jitted for every caller."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mfac_jax import _layout, algebra
from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse._coordinates import Pairs


@jax.jit
def factor(gram: Float[Array, "n n"], damping: Float[Array, ""]) -> algebra.Factor:
    """``L`` of ``A = n lambda I + G G^T``."""
    return algebra.factor(gram, len(gram) * damping)


inverse_lower = jax.jit(algebra.inverse_lower)


@jax.jit
def refined_solve(
    factor: algebra.Factor,
    gram: Float[Array, "n n"],
    damping: Float[Array, ""],
    rhs: Float[Array, " n"],
) -> Float[Array, " n"]:
    """``A^-1 b``; see :func:`mfac_jax.algebra.refined_solve`."""
    return algebra.refined_solve(factor, gram, len(gram) * damping, rhs)


@jax.jit
def shared_solve(
    factor: algebra.Factor,
    gram: Float[Array, "n n"],
    damping: Float[Array, ""],
    rhs: Float[Array, " n"],
    scale: Float[Array, ""] | Float[np.ndarray, ""],
) -> Float[Array, " n"]:
    """``scale A^-1 b`` for a product with ``G^T``; see :func:`mfac_jax.algebra.shared_solve`."""
    return jnp.multiply(scale, algebra.shared_solve(factor, gram, len(gram) * damping, rhs))


where = jax.jit(_layout.where)


@jax.jit
def where_or_scaled(
    mask: PyTree, tree: PyTree, elsewhere: PyTree, divisor: Float[Array, ""]
) -> PyTree:
    """``tree`` where the mask is true and ``elsewhere / divisor`` where it is false."""

    def of_leaf(keep: Array, x: Array, other: Array) -> Array:
        return jnp.where(keep, x, other.astype(x.dtype) / divisor.astype(x.dtype))

    return jax.tree.map(of_leaf, mask, tree, elsewhere)


@functools.partial(jax.jit, static_argnames="num_rows")
def diagonal(
    inner: PyTree,
    squares: PyTree,
    damping: Float[Array, ""],
    mask: PyTree | None,
    *,
    num_rows: int,
) -> PyTree:
    """``diag(F^-1)``.

    Args:
        inner: the squared norms of the columns of ``W``.
        squares: the squared norms of the columns of ``G``.
        damping: ``lambda``.
        mask: which coordinates take part; None for all.
        num_rows: ``n``.
    """

    def entry(inner: Array, square: Array) -> Array:
        return jnp.maximum((1 - inner) / damping, 1 / (damping + square / num_rows))

    found = jax.tree.map(entry, inner, squares)
    if mask is None:
        return found
    return jax.tree.map(lambda keep, x: jnp.where(keep, x, 1 / damping), mask, found)


@jax.jit
def sum_of_squares(
    outside: PyTree, solved: Float[Array, " n"], damping: Float[Array, ""]
) -> Float[Array, ""]:
    """``|x|^2 / lambda + n |c|^2``."""
    terms = [jnp.sum(leaf.astype(solved.dtype) ** 2) for leaf in jax.tree.leaves(outside)]
    return functools.reduce(jnp.add, terms) / damping + len(solved) * jnp.sum(solved * solved)


@jax.jit
def sample(noise: PyTree, inside: PyTree, damping: Float[Array, ""]) -> PyTree:
    """``(z + s) / sqrt(lambda)``."""
    return jax.tree.map(lambda z, s: (z + s) / jnp.sqrt(damping), noise, inside)


@jax.jit
def entries(
    pairs: Pairs,
    columns: tuple[Float[Array, "n k"], Float[Array, "n k"]],
    whitened: tuple[Float[Array, "n k"], Float[Array, "n k"]] | None,
    factor: algebra.Factor,
    damping: Float[Array, ""],
    layout: Layout,
    mask: PyTree | None,
) -> Float[Array, "..."]:
    """``(F^-1)_ij``.

    Args:
        pairs: the indices i and j.
        columns: the columns i and j of ``G``.
        whitened: the columns i and j of ``W``, if it is stored.
        factor: the factor of ``A``.
        damping: ``lambda``.
        layout: the parameters.
        mask: which coordinates take part; None for all.
    """
    g_i, g_j = columns
    if whitened is None:
        whitened = algebra.half_solve(factor, g_i), algebra.half_solve(factor, g_j)
    inner = jnp.sum(whitened[0] * whitened[1], axis=0)
    floor = 1 / (damping + jnp.sum(g_i * g_i, axis=0) / len(g_i))
    on_diagonal = jnp.maximum((1 - inner) / damping, floor)
    off_diagonal = -inner / damping
    if mask is not None:
        keep = layout.flat_mask(mask)
        both = keep[pairs.rows] & keep[pairs.columns]
        on_diagonal = jnp.where(both, on_diagonal, 1 / damping)
        off_diagonal = jnp.where(both, off_diagonal, jnp.zeros_like(inner))
    out = jnp.where(pairs.rows == pairs.columns, on_diagonal, off_diagonal)
    return jnp.where(pairs.valid, out, jnp.full_like(out, jnp.nan)).reshape(pairs.shape)


@jax.jit
def filled(diagonal: PyTree, damping: Float[Array, ""]) -> PyTree:
    """The diagonal with ``1 / lambda`` where it is 0, that is, outside all blocks."""
    return jax.tree.map(lambda x: jnp.where(x == 0, (1 / damping).astype(x.dtype), x), diagonal)
