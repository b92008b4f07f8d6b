"""The n x n algebra under every M-FAC formula.

Let the gradients ``g_1 .. g_n`` be the rows of ``G`` and ``lambda`` the damping. Every formula
reaches the damped empirical Fisher ``F = lambda I + G^T G / n`` through the n x n matrix

    A = n lambda I + K,   K = G G^T.

This module factors ``A`` and solves with it. It knows neither parameters nor ``d``. It computes
in the dtype of ``K``, which is float32 or wider, and never in TF32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from mfac_jax import _two_words

# If A is singular to working precision, a fraction of its diagonal is added to A: first eps, then
# 4 eps and so on until the factor exists.
_FLOOR_GROWTH = 4.0
_MAX_ATTEMPTS = 17

# A triangular matrix of at most this size is inverted by a triangular solve. Measured on two CPU
# cores for batches of 64 to 256 rows: 16 is faster than 32, 64 and 128.
_LARGEST_SOLVE = 16


class Factor(NamedTuple):
    """The Cholesky factor of ``A``.

    Attributes:
        lower: ``L`` with ``L L^T = A``; (n, n), lower triangular.
        floor: the fraction of its diagonal that was added to ``A`` so that the factor exists;
            scalar. It is 0 unless ``A`` is singular to working precision, as with repeated
            gradients under a damping below ``eps |g|^2 / n``.
    """

    lower: Float[Array, "n n"]
    floor: Float[Array, ""]


# Jitted for eager callers: an eager while_loop compiles in every call.
@jax.jit
def factor(gram: Float[Array, "n n"], shift: Float[Array, ""]) -> Factor:
    """Factors ``A = shift I + gram``.

    ``A`` is first scaled to a unit diagonal. Gradients of very different size (one row a million
    times as large as the others) therefore do not harm one another. A zero row with a zero shift
    counts as absent.

    Args:
        gram: ``K``; (n, n).
        shift: ``n lambda``; scalar.

    Returns:
        The factor of ``A``.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import algebra
        >>> factor = algebra.factor(jnp.array([[3.0]]), jnp.float32(1.0))
        >>> algebra.solve(factor, jnp.array([8.0]))
        Array([2.], dtype=float32)
    """
    lower, size, floor = _scaled_factor(gram, shift)
    return Factor(jnp.tril(lower) * size[:, None], floor)


@jax.jit
def inverse_root(gram: Float[Array, "*b n n"], shift: Float[Array, ""]) -> Float[Array, "*b n n"]:
    """``L^-1`` of one matrix or a batch: :func:`inverse_lower` of :func:`factor`.

    ``L`` itself is never written, because for blocks it is as large as their gradients.

    Args:
        gram: ``K``; (n, n), or a batch of them.
        shift: ``n lambda``; scalar.

    Returns:
        ``L^-1``; (n, n), or a batch of them.
    """
    lower, size, _ = _scaled_factor(gram, shift)
    return _inverse_triangular(lower) / jnp.expand_dims(size, -2)


@jax.jit
def square_root(gram: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """``R`` with ``R^T R = gram``, for one positive semidefinite matrix or a batch.

    ``gram`` is scaled to a unit diagonal and factored. If it is singular to working precision, a
    fraction of its diagonal is added: every entry of the diagonal then keeps its own relative
    accuracy, whatever its size. (An eigendecomposition loses the coordinates of small gradients and
    takes much longer.)

    Args:
        gram: (n, n), or a batch; only the lower triangle is read.

    Returns:
        ``R``, upper triangular, with zero columns for zero columns of ``gram``.
    """
    lower, _, _ = _scaled_factor(gram, jnp.zeros((), gram.dtype))
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(gram, axis1=-2, axis2=-1), 0))
    return jnp.matrix_transpose(jnp.tril(lower) * jnp.expand_dims(size, -1))


# Jitted for eager callers: otherwise every slice compiles separately.
@jax.jit
def _inverse_triangular(lower: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """The inverse of a lower triangular matrix, from the inverses of its halves.

        [T  0]^-1   [ T^-1          0   ]
        [C  B]    = [-B^-1 C T^-1   B^-1]

    Most of the work is then matrix products. A triangular solve with the identity takes up to
    twice as long on a CPU: it runs on one core and does not skip the zeros.
    """
    n, dtype = lower.shape[-1], lower.dtype
    levels = 0
    while n > _LARGEST_SOLVE << levels:
        levels += 1
    size = -(-n // 2**levels)
    rest = size * 2**levels - n
    if rest:  # pads with ones on the diagonal, so that all parts have one size
        lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, rest)] * 2)
        ones = jnp.diag((jnp.arange(n + rest) >= n).astype(dtype))
        lower = lower + jnp.broadcast_to(ones, lower.shape)

    def blocks(size: int, *, below: bool) -> Float[Array, "*b k s s"]:
        """The diagonal blocks, or for each pair the block below the diagonal, by one gather."""
        count = lower.shape[-1] // size // (2 if below else 1)
        own = jnp.arange(count, dtype=jnp.int32)
        if below:
            pairs = lower.reshape(*lower.shape[:-2], count, 2, size, count, 2, size)
            grid = pairs[..., 1, :, :, 0, :]
        else:
            grid = lower.reshape(*lower.shape[:-2], count, size, count, size)
        return jnp.moveaxis(grid[..., own, :, own, :], 0, -3)

    leaves = blocks(size, below=False)
    eye = jnp.broadcast_to(jnp.eye(size, dtype=dtype), leaves.shape)
    inverse = solve_triangular(leaves, eye, lower=True)
    for _ in range(levels):
        top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        inner = jnp.matmul(blocks(size, below=True), top, precision="highest")
        corner = jnp.matmul(bottom, inner, precision="highest")

        def placed(part: Array, row: int, column: int, size: int = size) -> Array:
            around = [(row * size, (1 - row) * size), (column * size, (1 - column) * size)]
            return jnp.pad(part, [(0, 0)] * (part.ndim - 2) + around)

        # A sum compiles faster than the concatenation of four parts.
        inverse = placed(top, 0, 0) - placed(corner, 1, 0) + placed(bottom, 1, 1)
        size *= 2
    return inverse[..., 0, :n, :n]


def _is_diagonal(gram: Float[Array, "*b n n"]) -> Bool[Array, "*b n n"]:
    return jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=bool), gram.shape)


def _scaled_factor(
    gram: Float[Array, "*b n n"], shift: Float[Array, ""]
) -> tuple[Float[Array, "*b n n"], Float[Array, "*b n"], Float[Array, "*b"]]:
    """The factor of ``A`` scaled to a unit diagonal, the scale of each row, and the floor."""
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1) + shift.astype(gram.dtype)
    size = jnp.sqrt(jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal)))
    row, column = jnp.expand_dims(1 / size, -1), jnp.expand_dims(1 / size, -2)
    eps = jnp.finfo(gram.dtype).eps

    def attempt(floor: Array) -> Array:
        own = jnp.expand_dims(1 + floor, (-2, -1))
        scaled = jnp.where(_is_diagonal(gram), own, gram * row * column)
        return lax.linalg.cholesky(scaled, symmetrize_input=False)

    def failed(lower: Array) -> Array:
        # A pivot below eps consists of rounding errors. The comparison is false for NaN.
        return ~jnp.all(jnp.diagonal(lower, axis1=-2, axis2=-1) ** 2 > eps, axis=-1)

    def again(carry: tuple[Array, Array, Array]) -> Array:
        lower, _, attempts = carry
        return jnp.any(failed(lower)) & (attempts < _MAX_ATTEMPTS)

    # In a batch only the floors of failed matrices grow; the factors of the others stay the same.
    def attempt_again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        lower, floor, attempts = carry
        floor = jnp.where(failed(lower), jnp.maximum(_FLOOR_GROWTH * floor, eps), floor)
        return attempt(floor), floor, attempts + 1

    # The first attempt comes before the loop, because a loop needs a factor to start from.
    floor = jnp.zeros_like(gram[..., 0, 0])
    start = (attempt(floor), floor, jnp.ones((), jnp.int32))
    lower, floor, _ = lax.while_loop(again, attempt_again, start)
    return lower, size, floor


def smallest_pivot(factor: Factor) -> Float[Array, ""]:
    """``min_i L_ii^2 / A_ii``, in [0, 1]: near 0 if ``A`` is nearly singular, at any scale."""
    own = jnp.diagonal(factor.lower) ** 2
    return jnp.min(own / jnp.sum(factor.lower**2, axis=1))


def half_solve(factor: Factor, rhs: Float[Array, "n *k"]) -> Float[Array, "n *k"]:
    """``L^-1 b``."""
    return solve_triangular(factor.lower, rhs.astype(factor.lower.dtype), lower=True)


def transposed_half_solve(factor: Factor, rhs: Float[Array, "n *k"]) -> Float[Array, "n *k"]:
    """``L^-T b``."""
    rhs = rhs.astype(factor.lower.dtype)
    return solve_triangular(factor.lower, rhs, lower=True, trans="T")


def solve(factor: Factor, rhs: Float[Array, "n *k"]) -> Float[Array, "n *k"]:
    """``A^-1 b``."""
    return transposed_half_solve(factor, half_solve(factor, rhs))


def refined_solve(
    factor: Factor, gram: Float[Array, "n n"], shift: Float[Array, ""], rhs: Float[Array, " n"]
) -> Float[Array, " n"]:
    """``A^-1 b`` with one step of refinement, whose residual has twice the working precision.

    The forward error of :func:`solve` is ``eps cond(A)``; here only the rounding errors of
    ``gram`` itself remain. The step takes O(n^2) and no scan of the gradients. For gradients
    with a common part (cosine 0.8) it halves the relative error of a direction. If ``A`` needs
    a floor, there is no refinement, and the solution is that of the floored matrix.

    Args:
        factor: the factor of ``shift I + gram``.
        gram: ``K``; (n, n).
        shift: ``n lambda``; scalar.
        rhs: ``b``; (n,).

    Returns:
        ``A^-1 b``; (n,).
    """
    first = solve(factor, rhs)
    step = solve(factor, residual(gram, shift.astype(gram.dtype), first, rhs.astype(gram.dtype)))
    return first + jnp.where(factor.floor > 0, jnp.zeros_like(first), step)


def shared_solve(
    factor: Factor, gram: Float[Array, "n n"], shift: Float[Array, ""], rhs: Float[Array, " n"]
) -> Float[Array, " n"]:
    """``A^-1 b`` for a product with ``G^T``: :func:`refined_solve`, and equal rows share.

    The arguments are those of :func:`refined_solve`. See :func:`share_between_equal_rows`.
    """
    solved = refined_solve(factor, gram, shift, share_between_equal_rows(gram, rhs))
    return share_between_equal_rows(gram, solved)


def residual(
    gram: Float[Array, "n n"],
    shift: Float[Array, ""],
    solution: Float[Array, " n"],
    rhs: Float[Array, " n"],
) -> Float[Array, " n"]:
    """``b - shift x - K x`` in twice the working precision, rounded once at the end.

    Args:
        gram: ``K``, symmetric; (n, n).
        shift: ``n lambda``; scalar.
        solution: ``x``; (n,).
        rhs: ``b``; (n,).

    Returns:
        The residual; (n,).
    """
    # Sums along columns: K is symmetric, so no transposition is needed.
    product = _two_words.summed(_two_words.product(gram, -solution[:, None]), axis=0)
    product = _two_words.add(product, _two_words.product(shift, -solution))
    high, low = _two_words.add(product, (rhs, jnp.zeros_like(rhs)))
    return high + low


def inverse_lower(factor: Factor) -> Float[Array, "n n"]:
    """``L^-1``."""
    return _inverse_triangular(factor.lower)


def log_det(factor: Factor) -> Float[Array, ""]:
    """``log det A``."""
    return 2.0 * jnp.sum(jnp.log(jnp.diagonal(factor.lower)))


def share_between_equal_rows(
    gram: Float[Array, "n n"], coefficients: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Gives equal gradients the same coefficient, the mean of their coefficients.

    ``G^T c`` depends only on the sum of the coefficients of equal rows. If row ``j`` occurs
    twice, ``A^-1 e_j`` holds ``+1 / (2 n lambda)`` and ``-1 / (2 n lambda)`` in the two places.
    These values cancel in exact arithmetic; in floating point they leave rounding errors. Sharing
    before and after the solve avoids these errors. Measured for a gradient that occurs three times
    (n = 128, ``|g|^2 = 2``, ``lambda = 1e-7``): the relative error of the direction falls from
    3e-2 to 3e-6.

    Two gradients are equal if their rows of the Gram matrix are equal to the last bit. Gradients
    that nearly agree keep their coefficients: under a small damping their difference matters.

    Args:
        gram: ``K``; (n, n).
        coefficients: ``c``; (n,).

    Returns:
        The shared coefficients; (n,).
    """
    n = gram.shape[0]
    own = jnp.arange(n, dtype=jnp.int32)
    norms = jnp.diagonal(gram)
    candidates = (gram == norms[:, None]) & (gram == norms[None, :])
    first = jnp.argmax(candidates, axis=1).astype(jnp.int32)
    first = jnp.where(jnp.all(gram[first] == gram, axis=1), first, own)
    sums = jax.ops.segment_sum(coefficients, first, n)
    sizes = jax.ops.segment_sum(jnp.ones_like(coefficients), first, n)
    return (sums / jnp.maximum(sizes, jnp.ones_like(sizes)))[first]
