"""Exact greedy Optimal Brain Surgeon inside blocks: one weight at a time.

All blocks work at the same time. In each, the weight whose removal costs least goes. The other
weights compensate for it exactly, and the inverse loses its row and column:

    q = argmin w_q^2 / (2 [F^-1]_qq)
    w      <-  w - F^-1 e_q w_q / [F^-1]_qq
    F^-1   <-  F^-1 - F^-1 e_q e_q^T F^-1 / [F^-1]_qq

until the block is empty. The score of a weight is the cost of its removal. The mask then cuts the
scores of all blocks at one level. O(d B^2).

Unlike the saliency of single weights, this score depends on the earlier removals. In a block,
scores never fall from one removal to the next, so a cut keeps the order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mfac_jax.inverse import GroupBlocks

# The inverses of the blocks in one batch hold this many numbers: 4 MiB, which stay in the cache of
# a CPU during the removals.
_ENTRIES = 2**20


class _Block(NamedTuple):
    """A block from which weights go one by one.

    Attributes:
        inverse: ``F^-1`` of the remaining weights; near 0 in the rows and columns of removed
            weights.
        weights: the updated weights.
        left: which weights can still go.
        scores: the cost of each removal; inf for weights that are not removed.
        last: the cost of the last removal.
    """

    inverse: Float[Array, "B B"]
    weights: Float[Array, " B"]
    left: Bool[Array, " B"]
    scores: Float[Array, " B"]
    last: Float[Array, ""]


def greedy_scores(
    inverse: Float[Array, "b B B"],
    weights: Float[Array, "b B"],
    alive: Bool[Array, "b B"],
    floor: Float[Array, "b B"],
    *,
    size: int = 1,
    quota: int | None = None,
) -> Float[Array, "b B"]:
    """The cost of each removal when weights go greedily.

    Args:
        inverse: ``F^-1`` of every block, over its alive weights.
        weights: their weights.
        alive: which weights are alive; the others score 0.
        floor: ``1 / F_jj``, the lower bound of a pivot.
        size: the number of weights in a group.
        quota: the number of weights of a group that may go, one by one. By default a group
            goes whole, and each of its weights scores the cost of the group.

    Returns:
        The scores; inf for weights that may not go.
    """
    weights = jnp.where(alive, weights, jnp.zeros_like(weights))
    remove = functools.partial(_remove_all, size=size, quota=quota)
    side = weights.shape[1]
    chunk = max(min(_ENTRIES // (side * side), weights.shape[0]), 1)
    return lax.map(lambda block: remove(*block), (inverse, weights, alive, floor), batch_size=chunk)


def _remove_all(
    inverse: Float[Array, "B B"],
    weights: Float[Array, " B"],
    alive: Bool[Array, " B"],
    floor: Float[Array, " B"],
    *,
    size: int,
    quota: int | None,
) -> Float[Array, " B"]:
    whole = quota is None and size > 1
    top = jnp.full_like(weights, jnp.inf)
    start = _Block(
        inverse,
        weights,
        alive,
        jnp.where(alive, top, jnp.zeros_like(top)),
        jnp.zeros_like(weights[0]),
    )

    def remove_weight(_: Int[Array, ""], block: _Block) -> _Block:
        left = block.left
        if quota is not None:
            removed = jnp.sum(~left.reshape(-1, size), axis=1)
            left = left & jnp.repeat(removed < quota, size)
        pivots = jnp.maximum(jnp.diagonal(block.inverse), floor)
        costs = jnp.where(left, block.weights**2 / (2 * pivots), top)
        q = jnp.argmin(costs)
        score = _at_least(costs[q], block.last)
        own = (jnp.arange(weights.shape[0]) == q) & left
        block = _eliminate(block, q, floor, left[q])
        return block._replace(
            left=block.left & ~own,
            scores=jnp.where(own, score, block.scores),
            last=jnp.where(left[q], score, block.last),
        )

    def remove_group(_: Int[Array, ""], block: _Block) -> _Block:
        left = block.left.reshape(-1, size)
        groups = GroupBlocks(_diagonal_blocks(block.inverse, size), floor.reshape(-1, size))
        costs = groups.inverse_quadratic_form(block.weights.reshape(-1, size)) / 2
        there = jnp.any(left, axis=1)
        costs = jnp.where(there, costs, jnp.full_like(costs, jnp.inf))
        q = jnp.argmin(costs)
        score = _at_least(costs[q], block.last)
        own = jnp.repeat((jnp.arange(left.shape[0]) == q) & there, size)
        for j in range(size):
            block = _eliminate(block, q * size + j, floor, there[q])
        return block._replace(
            left=block.left & ~own,
            scores=jnp.where(own, score, block.scores),
            last=jnp.where(there[q], score, block.last),
        )

    count = weights.shape[0] // size
    steps = count if whole else count * (size if quota is None else quota)
    return lax.fori_loop(0, steps, remove_group if whole else remove_weight, start).scores


def _eliminate(
    block: _Block, q: Int[Array, ""], floor: Float[Array, " B"], where: Bool[Array, ""]
) -> _Block:
    """Removes weight ``q`` if ``where`` is true; the other weights compensate for it."""
    row = block.inverse[q]
    pivot = jnp.maximum(row[q], floor[q])
    column = jnp.where(where, row / pivot, jnp.zeros_like(row))
    return block._replace(
        inverse=block.inverse - column[:, None] * row[None, :],
        weights=block.weights - column * block.weights[q],
    )


def _diagonal_blocks(matrix: Float[Array, "B B"], size: int) -> Float[Array, "k g g"]:
    """The ``g x g`` blocks along the diagonal."""
    count = len(matrix) // size
    blocks = matrix.reshape(count, size, count, size)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)


def _at_least(cost: Float[Array, ""], last: Float[Array, ""]) -> Float[Array, ""]:
    """The cost, raised to just above the last score if it is lower, so a cut keeps the order."""
    return jnp.maximum(cost, last * (1 + 2 * jnp.finfo(last.dtype).eps))
