"""The least loss that a group of weights costs, for all groups at once.

For the weights Q of a group, ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`` is the minimum of the quadratic
model over all updates of the others. It is worked out by elimination: the loss of the first
weight, of the second with the first gone, and so on. No pivot is below ``1 / F_jj``, its bound
for any positive definite ``F``, whatever rounding does.
"""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mfac_jax import algebra

# Up to so many weights of a group are eliminated one by one, in products of whole batches;
# larger groups are factored.
_LARGEST_ELIMINATED = 16

# N:M patterns with up to so many choices of weights have them all compared.
MOST_CHOICES = 70


def group_saliency(
    inverse: Float[Array, "*b g g"], weights: Float[Array, "*b g"], floor: Float[Array, "*b g"]
) -> Float[Array, "*b"]:
    """``1/2 w^T M^-1 w`` with ``M = [F^-1]_QQ``.

    Args:
        inverse: ``M`` of every group.
        weights: ``w_Q``.
        floor: ``1 / F_jj``, which the pivots are at least.

    Returns:
        The saliencies.
    """
    size = weights.shape[-1]
    if size > _LARGEST_ELIMINATED:
        own = jnp.maximum(jnp.diagonal(inverse, axis1=-2, axis2=-1), floor)
        eye = jnp.broadcast_to(jnp.eye(size, dtype=bool), inverse.shape)
        root = algebra.inverse_root(
            jnp.where(eye, jnp.expand_dims(own, -1), inverse), jnp.zeros((), inverse.dtype)
        )
        half = jnp.einsum("...ij,...j->...i", root, weights, precision="highest")
        return jnp.sum(half * half, axis=-1) / 2
    total = jnp.zeros_like(weights[..., 0])
    for j in range(size):
        pivot = jnp.maximum(inverse[..., j, j], floor[..., j])
        column = inverse[..., :, j] / pivot[..., None]
        total += weights[..., j] ** 2 / (2 * pivot)
        weights = weights - column * weights[..., j, None]
        inverse = inverse - column[..., :, None] * inverse[..., j, None, :]
    return total


def choices_of(n: int, m: int) -> int:
    """How many ways there are to take ``m - n`` of ``m`` weights."""
    return math.comb(m, n)


def _choices(n: int, m: int) -> Bool[np.ndarray, "c m"]:
    """All ways to take ``m - n`` of ``m`` weights, those that are taken true."""
    table = np.zeros((math.comb(m, n), m), bool)
    for row, taken in zip(table, itertools.combinations(range(m), m - n), strict=True):
        row[list(taken)] = True
    return table


def cheapest_choice(
    inverse: Float[Array, "*b m m"],
    weights: Float[Array, "*b m"],
    alive: Bool[Array, "*b m"],
    floor: Float[Array, "*b m"],
    n: int,
) -> Float[Array, "*b m"]:
    """For N:M: scores of the ``m - n`` weights that cost least together, inf for the others.

    All choices that contain what is pruned already are compared by their exact saliency,
    which is shared out evenly among the weights of the cheapest.
    """
    table = _choices(n, weights.shape[-1])
    costs = []
    for row in table:
        taken = np.flatnonzero(row)
        cost = group_saliency(
            inverse[..., taken[:, None], taken[None, :]], weights[..., taken], floor[..., taken]
        )
        possible = jnp.all(alive[..., ~row], axis=-1)
        costs.append(jnp.where(possible, cost, jnp.full_like(cost, jnp.inf)))
    cost = jnp.stack(costs, axis=-1)
    best = jnp.argmin(cost, axis=-1)
    going = jnp.asarray(table)[best] & alive
    count = jnp.sum(going, axis=-1, dtype=weights.dtype)
    share = jnp.min(cost, axis=-1) / jnp.maximum(count, jnp.ones_like(count))
    return jnp.where(going, share[..., None], jnp.full_like(weights, jnp.inf))


def diagonal_blocks(matrices: Float[Array, "*b B B"], size: int) -> Float[Array, "*b k g g"]:
    """The ``g x g`` blocks along the diagonal."""
    *batch, side, _ = matrices.shape
    count = side // size
    cut = matrices.reshape(*batch, count, size, count, size)
    return jnp.moveaxis(jnp.diagonal(cut, axis1=-4, axis2=-2), -1, -3)


def lowest_in_groups(
    scores: Float[Array, "k m"], alive: Bool[Array, "k m"], count: int
) -> Float[Array, "k m"]:
    """The ``count`` lowest scores of every group, pruned weights first; inf for the others."""
    key = jnp.where(alive, scores, jnp.full_like(scores, -jnp.inf))
    rank = jnp.argsort(jnp.argsort(key, axis=1), axis=1)
    return jnp.where(rank < count, scores, jnp.full_like(scores, jnp.inf))
