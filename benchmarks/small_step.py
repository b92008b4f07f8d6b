"""The n x n step of the optimizer: factor again, or update the factor or the inverse.

A factorization of ``A = n lambda I + K`` takes O(m^3). A Cholesky factor in order of age can be
updated in O(m^2): the oldest gradient leaves, the newest joins. The update is valid only while
``n lambda`` is constant. It changes under a schedule and with a damping relative to the trace of
the Fisher. The inverse of :mod:`mfac_jax.incremental` also works for a new shift.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from mfac_jax import algebra, incremental


class Aged(NamedTuple):
    """Gram matrix and factor with the oldest gradient first.

    Attributes:
        gram: ``K``; (m, m).
        lower: ``L`` with ``L L^T = shift I + K``; (m, m).
    """

    gram: jax.Array
    lower: jax.Array


def refactor(gram: jax.Array, slot: jax.Array, row: jax.Array, shift: jax.Array) -> tuple:
    """The library's n x n step in small windows, after the scan over the gradients.

    Args:
        gram: ``K``; (m, m).
        slot: the slot of the oldest gradient, which the newest one replaces.
        row: ``G g`` of the newest gradient, with ``g`` itself in ``slot``; (m,).
        shift: ``n lambda``.

    Returns:
        ``K`` and ``A^-1 e`` for the newest gradient.
    """
    gram = gram.at[slot].set(row).at[:, slot].set(row)
    newest = (jnp.arange(len(row)) == slot).astype(gram.dtype)
    return gram, _coefficients(algebra.factor(gram, shift), gram, shift, newest)


def age(gram: jax.Array, shift: jax.Array) -> Aged:
    """The initial state of :func:`update_factor`, from a Gram matrix in order of age."""
    return Aged(gram, algebra.factor(gram, shift).lower)


def update_factor(held: Aged, row: jax.Array, shift: jax.Array) -> tuple[Aged, jax.Array]:
    """:func:`refactor` in O(m^2), by an update of the factor.

    When the oldest gradient is removed, the rest of its column enters the factor of the
    others as a rank-one update. The update is triangular in closed form:

        L L^T + v v^T = L (I + p p^T) L^T,   p = L^-1 v,   I + p p^T = M M^T,
        M_jj = sqrt(t_j / t_(j-1)),   M_ij = p_i p_j / sqrt(t_j t_(j-1))  for i > j,

    with ``t_j = 1 + p_1^2 + .. + p_j^2``. The product ``L M`` takes one cumulative sum
    along the rows, so no loop over columns is needed.

    Args:
        held: Gram matrix and factor in order of age.
        row: ``G g`` of the newest gradient with the others in order of age and itself last.
        shift: ``n lambda``.

    Returns:
        The new state and ``A^-1 e`` for the newest gradient, in order of age.
    """
    lower = _rank_one_update(held.lower[1:, 1:], held.lower[1:, 0])
    last = solve_triangular(lower, row[:-1], lower=True)
    pivot = jnp.sqrt(row[-1] + shift - jnp.sum(last * last))
    lower = jnp.pad(lower, ((0, 1), (0, 1))).at[-1].set(jnp.append(last, pivot))
    gram = jnp.pad(held.gram[1:, 1:], ((0, 1), (0, 1))).at[-1].set(row).at[:, -1].set(row)
    newest = jnp.zeros_like(row).at[-1].set(1)
    factor = algebra.Factor(lower, jnp.zeros((), lower.dtype))
    return Aged(gram, lower), _coefficients(factor, gram, shift, newest)


def _rank_one_update(lower: jax.Array, v: jax.Array) -> jax.Array:
    """The Cholesky factor of ``L L^T + v v^T``."""
    p = solve_triangular(lower, v, lower=True)
    t = 1 + jnp.cumsum(p * p)
    before = jnp.concatenate([jnp.ones((1,), t.dtype), t[:-1]])
    # sum over i > j of L_ai p_i, and v_a = sum over all i of L_ai p_i.
    later = v[:, None] - jnp.cumsum(lower * p[None, :], axis=1)
    diagonal, beside = jnp.sqrt(t / before), p / jnp.sqrt(t * before)
    return jnp.tril(lower * diagonal[None, :] + later * beside[None, :])


def _coefficients(
    factor: algebra.Factor, gram: jax.Array, shift: jax.Array, newest: jax.Array
) -> jax.Array:
    shared = algebra.share_between_equal_rows(gram, newest)
    solved = algebra.refined_solve(factor, gram, shift, shared)
    return algebra.share_between_equal_rows(gram, solved)


def refactor_steps(count: int):
    """``count`` steps of :func:`refactor` as one program; the gradients repeat."""

    @jax.jit
    def run(gram: jax.Array, shift: jax.Array) -> tuple:
        def step(i: jax.Array, carry: tuple) -> tuple:
            held, _ = carry
            slot = i % len(gram)
            return refactor(held, slot, gram[slot], shift)

        return lax.fori_loop(0, count, step, (gram, jnp.zeros_like(gram[0])))

    return run


def update_factor_steps(count: int):
    """``count`` steps of :func:`update_factor` as one program; the gradients repeat."""

    @jax.jit
    def run(start: Aged, shift: jax.Array) -> tuple:
        def step(_: jax.Array, carry: tuple) -> tuple:
            held, _ = carry
            # The oldest gradient returns as the newest.
            return update_factor(held, jnp.roll(held.gram[0], -1), shift)

        return lax.fori_loop(0, count, step, (start, jnp.zeros_like(start.gram[0])))

    return run


def update_inverse_steps(count: int):
    """``count`` steps that update the inverse, as the library does in large windows.

    The shift oscillates by 2 %, so the inverse is never rebuilt.
    """

    @jax.jit
    def run(gram: jax.Array, inverse: incremental.IncrementalInverse, shift: jax.Array) -> tuple:
        def step(i: jax.Array, carry: tuple) -> tuple:
            gram, inverse, _ = carry
            slot = i % len(gram)
            row = gram[slot]
            gram = gram.at[slot].set(row).at[:, slot].set(row)
            moved = shift * (1 + 0.01 * (i % 3))
            solved, inverse = incremental.newest(inverse, gram, slot, moved)
            return gram, inverse, solved

        return lax.fori_loop(0, count, step, (gram, inverse, jnp.zeros_like(gram[0])))

    return run
