"""Building an inverse from rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mfac_jax import _checks, algebra
from mfac_jax._layout import PyTree
from mfac_jax.inverse._blocks import BlockInverse, block_diagonal
from mfac_jax.inverse._map import map_blocks
from mfac_jax.inverse._partition import BlockRun, Blocks, block_runs
from mfac_jax.inverse._whole import WholeInverse
from mfac_jax.rows import GradientRows, check_rows


def fisher_inverse(
    rows: GradientRows, damping: ArrayLike, *, blocks: Blocks = None
) -> WholeInverse | BlockInverse:
    """The inverse of ``F = lambda I + G^T G / n``, built once.

    Whole by default, in O(d n^2); with ``blocks``, of the block-diagonal Fisher, in
    O(d n min(n, B)).

    Args:
        rows: ``G``; n gradients of d entries.
        damping: ``lambda > 0``; a number or a scalar array.
        blocks: None for one block of all coordinates; an int B for blocks of B
            consecutive coordinates; ``"leaf"`` for a block a parameter; or a
            sequence of block sizes that add up to d.

    Returns:
        An object with ``ihvp``, ``diagonal``, ``entries``, ``submatrix``,
        ``quadratic_form``, ``log_det`` and ``sample``; a pytree, fit for ``jit``.

    Raises:
        TypeError: ``damping`` is not a number, or ``blocks`` is of another kind.
        ValueError: ``damping`` is not positive, or the blocks do not cover d.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import fisher_inverse, rows
        >>> gradients = rows.as_rows(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> inverse = fisher_inverse(gradients, damping=0.5)
        >>> inverse.diagonal()
        Array([1. , 0.4, 2. ], dtype=float32)

    Reference: Frantar, Kurtic, Alistarh, NeurIPS 2021, section 3.1.
    """
    check_rows(rows)
    _checks.positive_scalar(damping, "damping")
    lam = jnp.asarray(damping).astype(rows.dtype)
    runs = block_runs(rows.layout, blocks)
    whole = len(runs) == 1 and runs[0].count == 1
    if whole and rows.layout.size > rows.num_rows:
        return WholeInverse.build(rows, lam)
    return BlockInverse.build(rows, lam, runs)


def inverse_diagonal(
    rows: GradientRows,
    damping: ArrayLike,
    *,
    blocks: Blocks = None,
    mask: PyTree | None = None,
) -> PyTree:
    """``diag(F^-1)`` alone, a tile or some blocks at a time.

    The memory beside many gradients is a fraction of theirs.

    Args:
        rows: ``G``; n gradients of d entries.
        damping: ``lambda > 0``; a number or a scalar array.
        blocks: as in :func:`fisher_inverse`.
        mask: a tree of booleans with the structure of the parameters; the Fisher is
            restricted to the coordinates where it is true, and the diagonal is
            ``1 / lambda`` elsewhere. All by default.

    Returns:
        The diagonal, a tree like the parameters, positive everywhere.

    Raises:
        TypeError: ``damping`` is not a number, or ``blocks`` is of another kind.
        ValueError: ``damping`` is not positive, the blocks do not cover d, or the
            mask does not fit.
    """
    check_rows(rows)
    _checks.positive_scalar(damping, "damping")
    lam = jnp.asarray(damping).astype(rows.dtype)
    runs = block_runs(rows.layout, blocks)
    whole = len(runs) == 1 and runs[0].count == 1
    if not (whole and rows.layout.size > rows.num_rows):
        return _block_diagonal(rows, lam, runs, mask)
    n = rows.num_rows
    factor = algebra.factor(rows.gram(mask), n * lam)

    def entry(whitened: jax.Array, square: jax.Array) -> jax.Array:
        return jnp.maximum((1 - whitened) / lam, 1 / (lam + square / n))

    diagonal = jax.tree.map(
        entry,
        rows.column_square_sums(algebra.inverse_lower(factor), lower=True),
        rows.column_square_sums(),
    )
    if mask is None:
        return diagonal
    leaves, treedef = jax.tree.flatten(diagonal)
    kept_leaves = rows.layout.check_mask(mask)
    return jax.tree.unflatten(
        treedef,
        [jnp.where(k, x, 1 / lam) for k, x in zip(kept_leaves, leaves, strict=True)],
    )


def _block_diagonal(
    rows: GradientRows,
    damping: Float[Array, ""],
    runs: tuple[BlockRun, ...],
    mask: PyTree | None,
) -> PyTree:
    def diagonal(
        batch: Float[Array, "b n B"], keep: Bool[Array, "b B"] | None = None
    ) -> Float[Array, "b B"]:
        if keep is not None:
            batch = jnp.where(keep[:, None], batch, jnp.zeros_like(batch))
        return block_diagonal(batch, damping, rows.implementation)

    vectors = []
    if mask is not None and runs:
        leaves = rows.layout.check_mask(mask)
        vectors.append(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]))
    return rows.layout.unflatten(map_blocks(rows, runs, diagonal, *vectors))
