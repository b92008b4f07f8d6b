"""Chooses which weights of a group go in an N:M pattern."""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mfac_jax.inverse import GroupBlocks

# In N:M patterns with at most this many choices, all choices are compared.
MOST_CHOICES = 70


def num_choices(n: int, m: int) -> int:
    """How many sets of ``m - n`` weights of ``m`` there are."""
    return math.comb(m, n)


def _choices(n: int, m: int) -> Bool[np.ndarray, "c m"]:
    """All sets of ``m - n`` of ``m`` weights, one in each row: true for weights in the set."""
    table = np.zeros((math.comb(m, n), m), bool)
    for row, taken in zip(table, itertools.combinations(range(m), m - n), strict=True):
        row[list(taken)] = True
    return table


def cheapest_choice(
    blocks: GroupBlocks, weights: Float[Array, "*b m"], alive: Bool[Array, "*b m"], n: int
) -> Float[Array, "*b m"]:
    """Scores of the ``m - n`` weights that cost least together; inf for the other weights.

    Only choices that contain every pruned weight are possible. They are compared by their exact
    cost. The alive weights of the cheapest choice share its cost evenly.
    """
    inverse, floor = blocks.matrix, blocks.floor
    table = _choices(n, weights.shape[-1])
    costs = []
    for row in table:
        taken = np.flatnonzero(row)
        chosen = GroupBlocks(inverse[..., taken[:, None], taken[None, :]], floor[..., taken])
        cost = chosen.inverse_quadratic_form(weights[..., taken]) / 2
        possible = jnp.all(alive[..., ~row], axis=-1)
        costs.append(jnp.where(possible, cost, jnp.full_like(cost, jnp.inf)))
    cost = jnp.stack(costs, axis=-1)
    best = jnp.argmin(cost, axis=-1)
    going = jnp.asarray(table)[best] & alive
    count = jnp.sum(going, axis=-1, dtype=weights.dtype)
    share = jnp.min(cost, axis=-1) / jnp.maximum(count, jnp.ones_like(count))
    return jnp.where(going, share[..., None], jnp.full_like(weights, jnp.inf))


def lowest_in_groups(
    scores: Float[Array, "k m"], alive: Bool[Array, "k m"], count: int
) -> Float[Array, "k m"]:
    """The ``count`` lowest scores of every group, inf for the others.

    Pruned weights come before all others.
    """
    key = jnp.where(alive, scores, jnp.full_like(scores, -jnp.inf))
    rank = jnp.argsort(jnp.argsort(key, axis=1), axis=1)
    return jnp.where(rank < count, scores, jnp.full_like(scores, jnp.inf))
