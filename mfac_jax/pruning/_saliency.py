"""Scores: what the loss is expected to rise by when a weight is pruned.

Optimal Brain Surgeon scores a weight by ``w_q^2 / (2 [F^-1]_qq)``, the least rise of
the quadratic model over all updates of the other weights. Optimal Brain Damage, by
``w_q^2 F_qq / 2``, leaves the others where they are. Magnitude is the baseline.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse import Blocks, inverse_diagonal
from mfac_jax.pruning._inputs import as_damping
from mfac_jax.pruning._outputs import as_static
from mfac_jax.rows import GradientRows, check_rows


def saliency(
    params: PyTree,
    rows: GradientRows,
    damping: ArrayLike,
    *,
    mask: PyTree | None = None,
    blocks: Blocks = None,
) -> PyTree:
    """``w_q^2 / (2 [F^-1]_qq)`` of every weight. O(d n min(n, B)).

    Args:
        params: ``w``; a tree of real floating-point arrays.
        rows: ``G``; their gradients.
        damping: ``lambda > 0``; a number or a scalar array.
        mask: a tree of booleans like ``params``; the Fisher is restricted to the
            alive weights, where it is true. All by default.
        blocks: which blocks the Fisher has; see :func:`mfac_jax.fisher_inverse`.

    Returns:
        The scores, a tree like ``params`` in the accumulation dtype of the rows; 0
        where ``mask`` is false.

    Raises:
        TypeError: a leaf is not real floating point, the mask is not boolean, or an
            argument has the wrong type.
        ValueError: ``params`` or ``mask`` do not fit the rows, ``damping`` is not
            positive, or the blocks do not cover d.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import pruning, rows
        >>> gradients = rows.as_rows(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> pruning.saliency(jnp.array([1.0, 1.0, 2.0]), gradients, damping=0.5)
        Array([0.5 , 1.25, 1.  ], dtype=float32)

    Reference: Frantar, Kurtic, Alistarh, NeurIPS 2021, section 4.1 (its rho_p).
    """
    check_rows(rows)
    rows.layout.check(params, "params")
    if mask is not None:
        rows.layout.check_mask(mask)
    lam = as_damping(damping, rows)
    return _saliency(params, rows, lam, mask, blocks=as_static(blocks, rows.layout))


def obd_saliency(
    params: PyTree, rows: GradientRows, damping: ArrayLike, *, mask: PyTree | None = None
) -> PyTree:
    """``w_q^2 F_qq / 2`` of every weight: what its removal costs if no other moves. O(d n).

    Takes the arguments of :func:`saliency`, but for the blocks, which do not matter to the
    diagonal of ``F``; with the same result and errors.

    Reference: LeCun, Denker, Solla, "Optimal brain damage", NeurIPS 1989.
    """
    check_rows(rows)
    leaves = rows.layout.check(params, "params")
    lam = as_damping(damping, rows)
    squares = jax.tree.leaves(rows.column_square_sums())
    scores = [
        jnp.asarray(w).astype(rows.dtype) ** 2 * (lam + square / rows.num_rows) / 2
        for w, square in zip(leaves, squares, strict=True)
    ]
    tree = jax.tree_util.tree_unflatten(rows.layout.treedef, scores)
    return tree if mask is None else magnitude(tree, mask=mask)


def magnitude(params: PyTree, *, mask: PyTree | None = None) -> PyTree:
    """``|w|`` of every weight, 0 where ``mask`` is false: the baseline.

    Raises:
        TypeError: a leaf is not real floating point, or the mask is not boolean.
        ValueError: ``mask`` does not fit ``params``.
    """
    layout = Layout(params)
    leaves = [jnp.abs(leaf) for leaf in jax.tree.leaves(params)]
    if mask is not None:
        alive = layout.check_mask(mask)
        leaves = [
            jnp.where(here, leaf, jnp.zeros_like(leaf))
            for here, leaf in zip(alive, leaves, strict=True)
        ]
    return jax.tree_util.tree_unflatten(layout.treedef, leaves)


@functools.partial(jax.jit, static_argnames="blocks")
def _saliency(
    params: PyTree,
    rows: GradientRows,
    damping: Float[Array, ""],
    mask: PyTree | None,
    *,
    blocks: Blocks,
) -> PyTree:
    return saliency_by(inverse_diagonal(rows, damping, blocks=blocks, mask=mask), params, mask)


def saliency_by(diagonal: PyTree, params: PyTree, mask: PyTree | None) -> PyTree:
    """The saliency by the diagonal of the inverse."""
    scores = jax.tree.map(
        lambda w, d: jnp.asarray(w).astype(d.dtype) ** 2 / (2 * d), params, diagonal
    )
    return scores if mask is None else magnitude(scores, mask=mask)
