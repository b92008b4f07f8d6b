"""The inverse of ``A``, updated from step to step in O(n^2).

``A = shift I + K`` changes little from one step of the optimizer to the next: one gradient is
replaced, which changes one row and column of ``K``, and the shift ``n lambda`` moves a little.
The state therefore holds ``P``, the inverse of ``shift_0 I + K`` for the shift of an earlier
step:

- :func:`replace` updates ``P`` in closed form after a gradient is replaced. One Schur complement
  removes the old row and column; another adds the new ones.
- :func:`solve` solves ``A x = b`` by a few steps of ``x <- x + w P (b - A x)``. With
  ``w = 2 / (1 + shift / shift_0)`` each step shrinks the error by the factor
  ``|shift - shift_0| / (shift + shift_0)``. Since ``P A = I + (shift - shift_0) P``, most steps
  need a product with ``P`` and none with ``K``. Such steps cannot see the rounding errors of
  ``P``, so two residuals use ``K``, the last one in twice the working precision.

Every solution is checked by its residual and by the length of the last step. The check fails if
the shift moved too far, if ``P`` has accumulated rounding errors, or if the window changed in
another way. Then ``A`` is factored and ``P`` rebuilt, O(n^3). The returned solution is exact to
within rounding for any ``P``, so errors cannot drift.

Under ``vmap`` every step computes both branches, because a batch may need either.

The paper rebuilds its triangular coefficients in O(n^3) after every replaced gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import algebra

# The number of steps before the first residual that uses K, and the number between that residual
# and the residual in two words. One more step follows. The tolerance, in units of eps, admits a
# shift that has moved by at most 17 % down or 20 % up: each of the five steps then gains a factor
# of 10. Measured in float32 at m = 64 and 512, with P updated row by row and shifts moved by at
# most 18 %, the errors equal those of five steps that all use K. The first residual is needed:
# without it every step rebuilds P at a condition number of 860, though not at 80.
_FIRST_STEPS, _SECOND_STEPS = 3, 2
_TOLERANCE = 64.0

# On a CPU every step factors a smaller matrix, and P does not change. Both methods take
# microseconds there, and the factorization compiles faster. On a GPU a factorization takes dozens
# of launches, and the host waits for some of them.
ON_CPU_FROM = 128

# P is built only if the smallest pivot of A is larger than this. Below it, the rounding errors of P
# keep the steps from converging, so building P is wasted work.
_SMALLEST_PIVOT = 1e-4


class IncrementalInverse(NamedTuple):
    """``P``, the inverse of ``shift_0 I + K``.

    Attributes:
        matrix: ``P``; (n, n), all zeros before the first use and if ``A`` is nearly singular.
        shift: ``shift_0``, the shift for which ``P`` was built; scalar.
    """

    matrix: Float[Array, "n n"]
    shift: Float[Array, ""]


def empty(n: int, dtype: DTypeLike = jnp.float32) -> IncrementalInverse:
    """The state before the first use, for a Gram matrix of ``n`` gradients.

    Args:
        n: the number of gradients.
        dtype: the dtype of the Gram matrix.

    Returns:
        An inverse without entries: :func:`solve` factors ``A`` and builds ``P``.
    """
    return IncrementalInverse(jnp.zeros((n, n), dtype), jnp.ones((), dtype))


def newest(
    inverse: IncrementalInverse,
    gram: Float[Array, "n n"],
    slot: Int[Array, ""],
    shift: Float[Array, ""],
) -> tuple[Float[Array, " n"], IncrementalInverse]:
    """``A^-1 e`` for the newest gradient, the only one that changed since the last call.

    Gradients that equal it to the last bit share its coefficient. This does not change any
    combination of the gradients; see :func:`mfac_jax.algebra.share_between_equal_rows`. On a CPU
    a matrix smaller than 128 x 128 is factored, and the inverse is returned unchanged.

    Args:
        inverse: the inverse that the last call returned; :func:`empty` in the first call.
        gram: ``K``; (n, n).
        slot: the row of the newest gradient; scalar int.
        shift: ``n lambda > 0``; scalar.

    Returns:
        The coefficients, (n,), and the inverse for the next call.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import incremental
        >>> gram, shift = jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.float32(1.0)
        >>> inverse = incremental.empty(2)
        >>> coefficients, inverse = incremental.newest(inverse, gram, jnp.int32(0), shift)
        >>> coefficients
        Array([ 0.533, -0.133], dtype=float32)
    """
    own = gram[slot]
    equal = jnp.all(gram == own[None], axis=1) & (own == own[slot])
    equal &= jnp.diagonal(gram) == own[slot]
    weights = equal.astype(gram.dtype) / jnp.sum(equal, dtype=gram.dtype)

    def by_inverse() -> tuple[Float[Array, " n"], IncrementalInverse]:
        return solve(replace(inverse, gram, slot), gram, shift, weights)

    def by_factor() -> tuple[Float[Array, " n"], IncrementalInverse]:
        factor = algebra.factor(gram, shift)
        return algebra.shared_solve(factor, gram, shift, weights), inverse

    if gram.shape[0] < ON_CPU_FROM:
        solved, after = lax.platform_dependent(cpu=by_factor, default=by_inverse)
    else:
        solved, after = by_inverse()
    return jnp.where(equal, jnp.sum(weights * solved), solved), after


def replace(
    inverse: IncrementalInverse, gram: Float[Array, "n n"], slot: Int[Array, ""]
) -> IncrementalInverse:
    """Updates ``P`` after row and column ``slot`` of ``K`` have become those of ``gram``.

    Let ``p`` be the old row of ``P`` and ``k`` the new row of ``K`` without its diagonal. The
    inverse without the slot is ``P' = P - p p^T / p_slot``. With ``u = P' k``,

        P_new = P' + (u - e) (u - e)^T / (shift_0 + K_slot,slot - k . u).

    The result is empty if ``P`` is empty or if the denominator is not positive.

    Args:
        inverse: ``P`` for the old ``K``.
        gram: the new ``K``; (n, n).
        slot: the row and column that changed; scalar int.

    Returns:
        ``P`` for the new ``K`` and the same ``shift_0``.
    """
    own = jnp.arange(gram.shape[0], dtype=jnp.int32) == slot
    zero, one = jnp.zeros((), gram.dtype), jnp.ones((), gram.dtype)
    old, row = inverse.matrix[slot], gram[slot]
    beside = jnp.where(own, zero, row)
    leaving = old * lax.rsqrt(jnp.where(old[slot] > 0, old[slot], one))
    rest = _product(inverse.matrix, beside) - leaving * _product(leaving, beside)
    pivot = inverse.shift + row[slot] - _product(beside, jnp.where(own, zero, rest))
    joining = jnp.where(own, -one, rest) * lax.rsqrt(jnp.where(pivot > 0, pivot, one))
    left = inverse.matrix - jnp.outer(leaving, leaving)
    left = jnp.where(own[:, None] | own[None, :], zero, left)  # removes rounding errors
    matrix = left + jnp.outer(joining, joining)
    is_fit = (old[slot] > 0) & (pivot > 0)
    return inverse._replace(matrix=jnp.where(is_fit, matrix, jnp.zeros_like(matrix)))


def solve(
    inverse: IncrementalInverse,
    gram: Float[Array, "n n"],
    shift: Float[Array, ""],
    rhs: Float[Array, " n"],
) -> tuple[Float[Array, " n"], IncrementalInverse]:
    """``A^-1 b`` with ``A = shift I + K``, and the inverse for the next step.

    Args:
        inverse: ``P`` from :func:`replace`. Any other ``P`` gives the same solution.
        gram: ``K``; (n, n).
        shift: ``n lambda``; scalar.
        rhs: ``b``; (n,).

    Returns:
        The solution, as exact as that of :func:`mfac_jax.algebra.refined_solve`, and the
        inverse: ``inverse`` itself if the steps converged, otherwise a rebuilt one.
    """
    solution, converged = _iterate(inverse, gram, shift, rhs)
    return lax.cond(
        converged,
        lambda: (solution, inverse),
        lambda: _rebuild(gram, shift, rhs),
    )


def _iterate(
    inverse: IncrementalInverse,
    gram: Float[Array, "n n"],
    shift: Float[Array, ""],
    rhs: Float[Array, " n"],
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """The solution by steps with ``P``, and whether they converged."""
    moved, weight = shift - inverse.shift, 2 / (1 + shift / inverse.shift)

    def approximate(rhs: Float[Array, " n"], steps: int) -> Float[Array, " n"]:
        start = _product(inverse.matrix, rhs)
        solution = weight * start
        for _ in range(steps - 1):
            image = _product(inverse.matrix, solution)
            solution += weight * (start - solution - moved * image)
        return solution

    solution = approximate(rhs, _FIRST_STEPS)
    plain = rhs - shift * solution - _product(gram, solution)
    solution += approximate(plain, _SECOND_STEPS)
    residual = algebra.residual(gram, shift, solution, rhs)
    step = approximate(residual, 1)
    tolerance = _TOLERANCE * jnp.finfo(rhs.dtype).eps
    # |A_ij| <= sizes_i sizes_j. The comparisons are false for NaN, and for the zero solution of an
    # empty P.
    sizes = jnp.sqrt(jnp.diagonal(gram) + shift)
    most = tolerance * jnp.sum(sizes * jnp.abs(solution))
    solves = jnp.max(jnp.abs(residual) / sizes) < most
    converged = jnp.max(jnp.abs(step)) < tolerance * jnp.max(jnp.abs(solution))
    return solution + step, solves & converged


def _rebuild(
    gram: Float[Array, "n n"], shift: Float[Array, ""], rhs: Float[Array, " n"]
) -> tuple[Float[Array, " n"], IncrementalInverse]:
    """The solution by a factorization, and ``P`` from the factor."""
    factor = algebra.factor(gram, shift)
    solution = algebra.shared_solve(factor, gram, shift, rhs)

    # A triangular solve: P is rarely rebuilt, and one call compiles faster than many products.
    def invert() -> Float[Array, "n n"]:
        root = algebra.half_solve(factor, jnp.eye(len(gram), dtype=gram.dtype))
        return jnp.dot(root.T, root, precision="highest")

    fit = (algebra.smallest_pivot(factor) > _SMALLEST_PIVOT) & (factor.floor == 0)
    return solution, IncrementalInverse(lax.cond(fit, invert, lambda: jnp.zeros_like(gram)), shift)


def _product(x: Float[Array, "*k n"], y: Float[Array, " n"]) -> Float[Array, "*k"]:
    return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)
