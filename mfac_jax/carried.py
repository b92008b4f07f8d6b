"""The inverse of ``A`` carried from one step of the optimizer to the next, in O(n^2).

``A = shift I + K`` changes little from step to step: one gradient is replaced, which
changes one row and column of ``K``, and the shift ``n lambda`` moves by a few per cent at
the most. So the state holds ``P``, the inverse of ``shift_0 I + K`` for a shift of before:

- a replaced gradient changes ``P`` in closed form: its slot leaves by a Schur
  complement, the new row and column join by another (:func:`replace`);
- ``A x = b`` is solved by a few steps of ``x <- x + w P (b - A x)``, the last ones with a
  residual in twice the precision (:func:`solve`). With ``w = 2 / (1 + shift / shift_0)``
  the error shrinks by ``|shift - shift_0| / (shift + shift_0)`` in each.

The last step's own length says whether they converged. If not, because the shift moved
too far, because rounding errors have gathered in ``P`` or because the window was changed
by other means, ``A`` is factored and ``P`` made anew, O(n^3): whatever ``P`` is, a
solution that is returned is a solution. Nothing here can drift.

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

# Steps with a plain residual and with a wide one. A shift 20 % away makes 0.1^5 of them,
# which is what the tolerance, in units of eps, lets pass: the last step took most of it.
_PLAIN_STEPS, _WIDE_STEPS = 4, 1
_TOLERANCE = 64.0

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


def replace(
    carried: CarriedInverse, gram: Float[Array, "n n"], slot: Int[Array, ""]
) -> CarriedInverse:
    """``P`` after row and column ``slot`` of ``K`` have become those of ``gram``.

    With ``p`` the old row of ``P``, ``k`` the new row of ``K`` without its diagonal, and
    ``u = P' k`` where ``P' = P - p p^T / p_slot`` is the inverse without the slot,

        P_new = P' + (u - e) (u - e)^T / (shift + K_slot,slot - k . u).
    """
    own = jnp.arange(gram.shape[0], dtype=jnp.int32) == slot
    old, row = carried.matrix[slot], gram[slot]
    beside = jnp.where(own, jnp.zeros_like(row), row)
    leaving = old * lax.rsqrt(old[slot])
    rest = _product(carried.matrix, beside) - leaving * _product(leaving, beside)
    joining = jnp.where(own, -jnp.ones_like(row), rest)
    joining *= lax.rsqrt(carried.shift + row[slot] - _product(beside, rest))
    matrix = carried.matrix - jnp.outer(leaving, leaving) + jnp.outer(joining, joining)
    return carried._replace(matrix=matrix)


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
    weight = 2 / (1 + shift / carried.shift)

    def correction(residual: Float[Array, " n"]) -> Float[Array, " n"]:
        return weight * _product(carried.matrix, residual)

    solution = step = correction(rhs)
    for _ in range(_PLAIN_STEPS):
        step = correction(rhs - shift * solution - _product(gram, solution))
        solution += step
    for _ in range(_WIDE_STEPS):
        step = correction(algebra.residual(gram, shift, solution, rhs))
        solution += step
    tolerance = _TOLERANCE * jnp.finfo(rhs.dtype).eps
    # NaN compares as false, and so does a solution of zero, which an empty P gives.
    return solution, jnp.max(jnp.abs(step)) < tolerance * jnp.max(jnp.abs(solution))


def _anew(
    gram: Float[Array, "n n"], shift: Float[Array, ""], rhs: Float[Array, " n"]
) -> tuple[Float[Array, " n"], CarriedInverse]:
    factor = algebra.factor(gram, shift)
    shared = algebra.share_between_equal_rows(gram, rhs)
    solution = algebra.refined_solve(factor, gram, shift, shared)
    solution = algebra.share_between_equal_rows(gram, solution)

    def invert() -> Float[Array, "n n"]:
        root = algebra.inverse_lower(factor)
        return jnp.dot(root.T, root, precision="highest")

    fit = (algebra.smallest_pivot(factor) > _SMALLEST_PIVOT) & (factor.floor == 0)
    return solution, CarriedInverse(lax.cond(fit, invert, lambda: jnp.zeros_like(gram)), shift)


def _product(x: Float[Array, "*k n"], y: Float[Array, " n"]) -> Float[Array, "*k"]:
    return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)
