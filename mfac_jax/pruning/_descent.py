"""A step of the weights that stay, down the loss itself.

At the minimum of the quadratic model over the weights that stay, what is left of its gradient
is the loss's own, ``g``. Its next step is the optimizer's, ``-F^-1 g`` with ``F`` over those
weights; and since ``g`` is a mean of the rows, nothing is subtracted (identity 2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mfac_jax import algebra
from mfac_jax._layout import PyTree
from mfac_jax.rows import GradientRows


@jax.jit
def descent(
    rows: GradientRows,
    gram: Float[Array, "n n"],
    mask: PyTree,
    mean: Float[Array, " n"],
    relative_damping: Float[Array, ""],
) -> PyTree:
    """``-F^-1 g = -n G^T (n lambda I + G G^T)^-1 a`` on the weights that stay.

    Args:
        rows: ``G``.
        gram: ``G G^T`` over the weights that stay.
        mask: which weights stay.
        mean: ``a``, with ``g = G^T a``.
        relative_damping: ``lambda`` as a fraction of the trace of ``G^T G / n``.

    Returns:
        The direction, a tree like the parameters; 0 where no weight is, or no gradient.
    """
    n = rows.num_rows
    trace = jnp.trace(gram) / n
    shift = n * relative_damping * jnp.where(trace > 0, trace, jnp.ones_like(trace))
    shared = algebra.share_between_equal_rows(gram, mean.astype(gram.dtype))
    solved = algebra.solve(algebra.factor(gram, shift), shared)
    direction = rows.combine(-n * algebra.share_between_equal_rows(gram, solved))
    return jax.tree.map(lambda keep, x: jnp.where(keep, x, jnp.zeros_like(x)), mask, direction)
