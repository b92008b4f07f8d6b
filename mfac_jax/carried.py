"""The inverse of ``A`` carried from one step of the optimizer to the next, in O(n^2).

``A = shift I + K`` changes little from step to step: one gradient is replaced, which
changes one row and column of ``K``, and the shift ``n lambda`` moves a little. So the state
holds ``P``, the inverse of ``shift_0 I + K`` for a shift of before:

- a replaced gradient changes ``P`` in closed form: its slot leaves by a Schur
  complement, the new row and column join by another (:func:`replace`);
- ``A x = b`` is solved by a few steps of ``x <- x + w P (b - A x)`` (:func:`solve`). With
  ``w = 2 / (1 + shift / shift_0)`` the error shrinks by
  ``|shift - shift_0| / (shift + shift_0)`` in each. Since ``P A = I + (shift - shift_0) P``,
  most of them need a product with ``P`` and none with ``K``. Such steps cannot see the rounding
  errors of ``P``, so two residuals are made with ``K``, the last one in twice the precision.

Each solution is checked, by its own residual and by the length of the last step. If the
shift moved too far, if rounding errors have gathered in ``P`` or if the window was changed
by other means, ``A`` is factored and ``P`` made anew, O(n^3): whatever ``P`` is, a
solution that is returned is one to within rounding. Nothing here can drift.

Under ``vmap`` both ways are taken in every step, since a batch may need either.

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

# Steps before the first residual that is made with K, and between it and the wide one; one more
# step follows. The tolerance, in units of eps, admits a shift that has moved by up to 17 % down or
# 20 % up: each of the five steps then gains a factor of 10. Measured in float32 at m = 64 and 512,
# with P replaced row by row and shifts moved by up to 18 %: the errors are those of five steps that
# all use K. The residual in the middle is needed: without it P is made anew in every step at a
# condition number of 860, though not at 80.
_FIRST_STEPS, _SECOND_STEPS = 3, 2
_TOLERANCE = 64.0

# On a CPU a smaller matrix is factored in every step, and P stays as it is. Either way takes
# microseconds there, and factoring compiles sooner. On a GPU factoring is dozens of launches and
# waits of the host.
CARRY_ON_CPU_FROM = 128

# P is made where the factor is at least that far from singular. Below, its rounding errors
# would keep the steps from converging, and making it would be in vain.
_SMALLEST_PIVOT = 1e-4


class CarriedInverse(NamedTuple):
    """``P``, the inverse of ``shift I + K``.

    Attributes:
        matrix: ``P``; (n, n), zero if there is none.
        shift: scalar.
    """

    matrix: Float[Array, "n n"]
    shift: Float[Array, ""]


def empty(n: int, dtype: DTypeLike = jnp.float32) -> CarriedInverse:
    """None yet, for a window of ``n`` gradients whose Gram matrix is in ``dtype``."""
    return CarriedInverse(jnp.zeros((n, n), dtype), jnp.ones((), dtype))


def newest(
    inverse: CarriedInverse,
    gram: Float[Array, "n n"],
    slot: Int[Array, ""],
    shift: Float[Array, ""],
) -> tuple[Float[Array, " n"], CarriedInverse]:
    """``A^-1 e`` for the gradient in ``slot``, the only one that changed since the last call.

    Gradients that equal it to the last bit share its coefficient, which is right for every
    combination of the gradients; see :func:`mfac_jax.algebra.share_between_equal_rows`. On a CPU
    a matrix below 128 x 128 is factored, and the inverse comes back as it was given.

    Args:
        inverse: what the last call returned; :func:`empty` at first.
        gram: ``K``.
        slot: scalar int.
        shift: ``n lambda > 0``.

    Returns:
        The coefficients; (n,); and the inverse for the next call.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import carried
        >>> gram, shift = jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.float32(1.0)
        >>> coefficients, inverse = carried.newest(carried.empty(2), gram, jnp.int32(0), shift)
        >>> coefficients
        Array([ 0.533, -0.133], dtype=float32)
    """
    own = gram[slot]
    equal = jnp.all(gram == own[None], axis=1) & (own == own[slot])
    equal &= jnp.diagonal(gram) == own[slot]
    weights = equal.astype(gram.dtype) / jnp.sum(equal, dtype=gram.dtype)

    def by_inverse() -> tuple[Float[Array, " n"], CarriedInverse]:
        return solve(replace(inverse, gram, slot), gram, shift, weights)

    def by_factor() -> tuple[Float[Array, " n"], CarriedInverse]:
        factor = algebra.factor(gram, shift)
        return _solve_by_factor(factor, gram, shift, weights), inverse

    if gram.shape[0] < CARRY_ON_CPU_FROM:
        solved, after = lax.platform_dependent(cpu=by_factor, default=by_inverse)
    else:
        solved, after = by_inverse()
    return jnp.where(equal, jnp.sum(weights * solved), solved), after


def replace(
    carried: CarriedInverse, gram: Float[Array, "n n"], slot: Int[Array, ""]
) -> CarriedInverse:
    """``P`` after row and column ``slot`` of ``K`` have become those of ``gram``.

    With ``p`` the old row of ``P``, ``k`` the new row of ``K`` without its diagonal, and
    ``u = P' k`` where ``P' = P - p p^T / p_slot`` is the inverse without the slot,

        P_new = P' + (u - e) (u - e)^T / (shift + K_slot,slot - k . u).

    Where ``P`` has no such slot, being empty, or the last factor is not positive, the
    result is empty.
    """
    own = jnp.arange(gram.shape[0], dtype=jnp.int32) == slot
    zero, one = jnp.zeros((), gram.dtype), jnp.ones((), gram.dtype)
    old, row = carried.matrix[slot], gram[slot]
    beside = jnp.where(own, zero, row)
    leaving = old * lax.rsqrt(jnp.where(old[slot] > 0, old[slot], one))
    rest = _product(carried.matrix, beside) - leaving * _product(leaving, beside)
    pivot = carried.shift + row[slot] - _product(beside, jnp.where(own, zero, rest))
    joining = jnp.where(own, -one, rest) * lax.rsqrt(jnp.where(pivot > 0, pivot, one))
    left = carried.matrix - jnp.outer(leaving, leaving)
    left = jnp.where(own[:, None] | own[None, :], zero, left)  # which it is but for rounding
    matrix = left + jnp.outer(joining, joining)
    is_fit = (old[slot] > 0) & (pivot > 0)
    return carried._replace(matrix=jnp.where(is_fit, matrix, jnp.zeros_like(matrix)))


def solve(
    carried: CarriedInverse,
    gram: Float[Array, "n n"],
    shift: Float[Array, ""],
    rhs: Float[Array, " n"],
) -> tuple[Float[Array, " n"], CarriedInverse]:
    """``A^-1 b`` with ``A = shift I + K``, and the inverse to carry on with.

    Args:
        carried: that of :func:`replace`, or any other.
        gram: ``K``.
        shift: ``n lambda``.
        rhs: ``b``.

    Returns:
        The solution, as exact as :func:`mfac_jax.algebra.refined_solve`; and ``carried``,
        or one made anew where it did not do.
    """
    solution, converged = _iterate(carried, gram, shift, rhs)
    return lax.cond(
        converged,
        lambda: (solution, carried),
        lambda: _anew(gram, shift, rhs),
    )


def _iterate(
    carried: CarriedInverse,
    gram: Float[Array, "n n"],
    shift: Float[Array, ""],
    rhs: Float[Array, " n"],
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    moved, weight = shift - carried.shift, 2 / (1 + shift / carried.shift)

    def approximate(rhs: Float[Array, " n"], steps: int) -> Float[Array, " n"]:
        start = _product(carried.matrix, rhs)
        solution = weight * start
        for _ in range(steps - 1):
            image = _product(carried.matrix, solution)
            solution += weight * (start - solution - moved * image)
        return solution

    solution = approximate(rhs, _FIRST_STEPS)
    plain = rhs - shift * solution - _product(gram, solution)
    solution += approximate(plain, _SECOND_STEPS)
    residual = algebra.residual(gram, shift, solution, rhs)
    step = approximate(residual, 1)
    tolerance = _TOLERANCE * jnp.finfo(rhs.dtype).eps
    # |A_ij| <= sizes_i sizes_j. NaN compares as false, and so does a solution of zero, which an
    # empty P gives.
    sizes = jnp.sqrt(jnp.diagonal(gram) + shift)
    most = tolerance * jnp.sum(sizes * jnp.abs(solution))
    solves = jnp.max(jnp.abs(residual) / sizes) < most
    converged = jnp.max(jnp.abs(step)) < tolerance * jnp.max(jnp.abs(solution))
    return solution + step, solves & converged


def _anew(
    gram: Float[Array, "n n"], shift: Float[Array, ""], rhs: Float[Array, " n"]
) -> tuple[Float[Array, " n"], CarriedInverse]:
    factor = algebra.factor(gram, shift)
    solution = _solve_by_factor(factor, gram, shift, rhs)

    # By a triangular solve: it is rarely made, and one call compiles faster than many products.
    def invert() -> Float[Array, "n n"]:
        root = algebra.half_solve(factor, jnp.eye(len(gram), dtype=gram.dtype))
        return jnp.dot(root.T, root, precision="highest")

    fit = (algebra.smallest_pivot(factor) > _SMALLEST_PIVOT) & (factor.floor == 0)
    return solution, CarriedInverse(lax.cond(fit, invert, lambda: jnp.zeros_like(gram)), shift)


def _solve_by_factor(
    factor: algebra.Factor,
    gram: Float[Array, "n n"],
    shift: Float[Array, ""],
    rhs: Float[Array, " n"],
) -> Float[Array, " n"]:
    shared = algebra.share_between_equal_rows(gram, rhs)
    solution = algebra.refined_solve(factor, gram, shift, shared)
    return algebra.share_between_equal_rows(gram, solution)


def _product(x: Float[Array, "*k n"], y: Float[Array, " n"]) -> Float[Array, "*k"]:
    return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)
