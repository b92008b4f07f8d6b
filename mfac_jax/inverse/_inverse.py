"""The inverse of the damped Fisher of given gradients, whole or in blocks.

The whole inverse follows from G and ``A = n lambda I + G G^T = L L^T``:

    F^-1 v = (v - G^T A^-1 G v) / lambda
    F^-1 G^T a = n G^T A^-1 a

It takes scans of the rows and n x n work. In blocks, each block is inverted on its cheaper side
(:mod:`mfac_jax.inverse._factored`). Nothing d-sized is stored unless :meth:`FisherInverse.whiten`
is called.

The paper's recursion (its equations 3 to 6) computes the rows of ``W = L^-1 G`` one by one: its
``h_i / sqrt(n + g_i . h_i)`` is row i of ``W / sqrt(lambda)``. One Cholesky factorization does
that work as matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mfac_jax import _checks
from mfac_jax._finite import finite_leaves
from mfac_jax._layout import PyTree
from mfac_jax.inverse import _whole_algebra
from mfac_jax.inverse._base import FisherInverse
from mfac_jax.inverse._blockwise_inverse import BlockwiseInverse
from mfac_jax.inverse._whole_inverse import WholeInverse
from mfac_jax.rows import Blocks, GradientRows, Partition, partition
from mfac_jax.rows._base import check_columns, check_rows


def fisher_inverse(
    rows: GradientRows,
    damping: ArrayLike,
    *,
    mask: PyTree | None = None,
    blocks: Blocks = None,
) -> FisherInverse:
    """The inverse of ``F = lambda I + G^T G / n``.

    By default it is the whole inverse, from one Gram matrix and one factor: O(d n^2 + n^3). With
    ``blocks`` it is the inverse of the block-diagonal Fisher. Each call of a method then inverts
    the blocks, O(d n min(n, B)), unless :meth:`FisherInverse.whiten` has stored the inverses. Each
    method runs a few compiled programs, if ``jit`` can trace the rows. The inverse holds the rows
    without a copy, but a function under ``jax.jit`` that returns the inverse copies them.

    Args:
        rows: ``G``; n gradients of d entries. Blocks and entries need rows whose columns can be
            read (:class:`mfac_jax.rows.ColumnRows`).
        damping: ``lambda > 0``; a number or a scalar array.
        mask: a tree of booleans with the structure of the parameters; gradients count as 0
            where it is false, but must be finite there too. All true by default.
        blocks: None for one block of all coordinates; an int B for blocks of B
            consecutive coordinates; ``"leaf"`` for one block for each parameter; or a
            sequence of block sizes that add up to d.

    Returns:
        The inverse, a pytree; it can cross ``jit`` if the rows can be traced.

    Raises:
        TypeError: ``damping`` is not a number, ``blocks`` has another type, or the columns of
            the rows are needed and cannot be read.
        ValueError: ``damping`` is not positive, the blocks do not cover d, or the mask does
            not fit.
        FloatingPointError: there is a mask, and a gradient has NaN or Inf in it. Inside ``jit``
            there is no error.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import fisher_inverse, rows
        >>> gradients = rows.as_rows(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> inverse = fisher_inverse(gradients, damping=0.5)
        >>> inverse.diagonal()
        Array([1. , 0.4, 2. ], dtype=float32)

    Reference: Frantar, Kurtic, Alistarh, NeurIPS 2021, section 3.1.
    """
    layout = check_rows(rows).layout
    _checks.positive_scalar(damping, "damping")
    if mask is not None:
        mask = jax.tree.unflatten(layout.treedef, layout.check_mask(mask))
        if rows.has_products:
            _check_finite(rows)
    cut = partition(layout, blocks)
    if not uses_products(rows, cut):
        check_columns(
            rows, f"an inverse with blocks={blocks!r}, n={rows.num_rows}, d={layout.size}"
        )
    lam = jnp.asarray(damping).astype(rows.dtype)
    return inverse_of(rows, mask, lam, cut, lambda: rows.gram(mask))


def inverse_of(
    rows: GradientRows,
    mask: PyTree | None,
    damping: Float[Array, ""],
    blocks: Partition,
    gram: Callable[[], Float[Array, "n n"]],
) -> FisherInverse:
    """:func:`fisher_inverse` of arguments that are checked.

    The mask must be false at coordinates outside all blocks; results there have no meaning.

    Args:
        rows: ``G``.
        mask: which coordinates take part; None for all.
        damping: ``lambda``.
        blocks: the blocks of the Fisher.
        gram: returns ``G G^T`` over the mask; called if the inverse needs it.
    """
    if uses_products(rows, blocks):
        return whole_inverse(rows, mask, damping, blocks, gram())
    return BlockwiseInverse(rows, mask, damping, blocks)


def whole_inverse(
    rows: GradientRows,
    mask: PyTree | None,
    damping: Float[Array, ""],
    blocks: Partition,
    gram: Float[Array, "n n"],
) -> FisherInverse:
    """:func:`inverse_of` for one block of any size, always with an n x n factor."""
    return WholeInverse(rows, mask, damping, blocks, gram, _whole_algebra.factor(gram, damping))


def products_suffice(num_rows: int, blocks: Partition) -> bool:
    """Whether products of n rows suffice: one block of more than n coordinates holds all."""
    return blocks.is_whole and blocks.runs[0].size > num_rows


def uses_products(rows: GradientRows, blocks: Partition) -> bool:
    """Whether products with the rows are all that an inverse in these blocks needs."""
    return rows.has_products and products_suffice(rows.num_rows, blocks)


def _check_finite(rows: GradientRows) -> None:
    """Checks that gradients are finite: products read them where a mask is false, too."""
    # Zero times NaN or Inf is NaN.
    sums = rows.combine(jnp.zeros(rows.num_rows, rows.dtype))
    for path, finite in zip(rows.layout.paths, finite_leaves(jax.tree.leaves(sums)), strict=True):
        if not finite:
            raise FloatingPointError(
                "gradients must be finite, also where mask is false; got NaN or Inf in those of "
                f"params{path}."
            )
