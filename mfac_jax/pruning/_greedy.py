"""Exact greedy Optimal Brain Surgeon inside blocks: one weight at a time.

All blocks work at the same time. In each, the weight whose removal costs least goes. The other
weights compensate for it exactly, and the inverse loses its row and column:

    q = argmin w_q^2 / (2 [F^-1]_qq)
    w      <-  w - F^-1 e_q w_q / [F^-1]_qq
    F^-1   <-  F^-1 - F^-1 e_q e_q^T F^-1 / [F^-1]_qq

until the block is empty. The score of a weight is the cost of its removal. The mask then cuts the
scores of all blocks at one level. O(d B^2).

A removal reads only one row and the diagonal of the inverse. So the inverse changes once for
several removals, by one matrix product. Until then, the vectors
``u = F^-1 e_q / sqrt([F^-1]_qq)`` of these removals are kept. Their products ``u u^T`` correct the
row that is read.

Unlike the saliency of single weights, this score depends on the earlier removals. In a block,
scores never fall from one removal to the next, so a cut keeps the order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mfac_jax.inverse import GroupBlocks

# The inverses of the blocks in one batch hold this many numbers: 4 MiB, which stay in the cache of
# a CPU during the removals.
_ENTRIES = 2**20
# The inverse changes once for this many removals of a weight. A removal reads as many vectors.
_DELAY = 16


class _Block(NamedTuple):
    """A block from which weights go one by one.

    Attributes:
        inverse: ``F^-1`` of the remaining weights, before the removals in ``panel``.
        panel: ``u`` of the removals since then; 0 where there is none.
        diagonal: the blocks along the diagonal of ``F^-1`` after all removals; a block for each
            group. Near 0 for removed weights.
        weights: the updated weights.
        left: which weights can still go.
        scores: the cost of each removal; inf for weights that are not removed.
        last: the cost of the last removal.
    """

    inverse: Float[Array, "B B"]
    panel: Float[Array, "k B"]
    diagonal: Float[Array, "B/g g g"]
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
    count, side = weights.shape
    chunk = max(min(_ENTRIES // (side * side), count), 1)
    # Blocks with equally many weights are done together, in as many rounds as they need.
    order = jnp.argsort(-jnp.sum(alive, axis=1))
    padded = jnp.pad(order, (0, -count % chunk), constant_values=count).reshape(-1, chunk)
    remove = functools.partial(_remove_all, size=size, quota=quota)

    def scores_of(chosen: Int[Array, " c"]) -> Float[Array, "c B"]:
        def take(part: Array) -> Array:
            return part.at[chosen].get(mode="fill", fill_value=0)

        return remove(*map(take, (inverse, weights, alive, floor)))

    found = lax.map(scores_of, padded).reshape(-1, side)[:count]
    return jnp.zeros_like(found).at[order].set(found)


def _remove_all(
    inverse: Float[Array, "c B B"],
    weights: Float[Array, "c B"],
    alive: Bool[Array, "c B"],
    floor: Float[Array, "c B"],
    *,
    size: int,
    quota: int | None,
) -> Float[Array, "c B"]:
    whole = quota is None and size > 1
    group = size if whole else 1  # the weights that go together
    delay = max(_DELAY // group, 1)  # removals between two changes of the inverse
    top = jnp.full_like(weights, jnp.inf)
    side = weights.shape[1]
    blocks = _Block(
        inverse,
        jnp.zeros((len(weights), delay * group, side), weights.dtype),
        jax.vmap(functools.partial(_diagonal_blocks, size=group))(inverse),
        weights,
        alive,
        jnp.where(alive, top, jnp.zeros_like(top)),
        jnp.zeros_like(weights[:, 0]),
    )
    remove = (
        functools.partial(_remove_group, size=size)
        if whole
        else functools.partial(_remove_weight, size=size, quota=quota)
    )

    def round_of_removals(_: Int[Array, ""], blocks: _Block) -> _Block:
        def one(i: Int[Array, ""], blocks: _Block) -> _Block:
            return jax.vmap(lambda block, bound: remove(i, block, bound))(blocks, floor)

        blocks = lax.fori_loop(0, delay, one, blocks)
        gone = jnp.einsum("cki,ckj->cij", blocks.panel, blocks.panel, precision="highest")
        return blocks._replace(inverse=blocks.inverse - gone, panel=jnp.zeros_like(blocks.panel))

    there = alive.reshape(len(alive), -1, size)
    if whole:
        removals = jnp.sum(jnp.any(there, axis=2), axis=1)
    else:
        removals = jnp.sum(jnp.minimum(jnp.sum(there, axis=2), size if quota is None else quota), 1)
    rounds = (jnp.max(removals) + delay - 1) // delay
    return lax.fori_loop(0, rounds, round_of_removals, blocks).scores


def _remove_weight(
    i: Int[Array, ""],
    block: _Block,
    floor: Float[Array, " B"],
    *,
    size: int,
    quota: int | None,
) -> _Block:
    """Removes the cheapest weight: the ``i``-th removal since the inverse changed."""
    left = block.left
    if quota is not None:
        removed = jnp.sum(~left.reshape(-1, size), axis=1)
        left = left & jnp.repeat(removed < quota, size)
    pivots = jnp.maximum(block.diagonal[:, 0, 0], floor)
    q, cost = _cheapest(block.weights**2 / (2 * pivots), left)
    score = _at_least(cost, block.last)
    own = (jnp.arange(len(floor)) == q) & left
    return _eliminate(i, block, q, floor, left[q])._replace(
        left=block.left & ~own,
        scores=jnp.where(own, score, block.scores),
        last=jnp.where(left[q], score, block.last),
    )


def _remove_group(
    i: Int[Array, ""], block: _Block, floor: Float[Array, " B"], *, size: int
) -> _Block:
    """Removes the cheapest group: the ``i``-th removal since the inverse changed."""
    left = block.left.reshape(-1, size)
    groups = GroupBlocks(block.diagonal, floor.reshape(-1, size))
    costs = groups.inverse_quadratic_form(block.weights.reshape(-1, size)) / 2
    there = jnp.any(left, axis=1)
    q, cost = _cheapest(costs, there)
    score = _at_least(cost, block.last)
    own = jnp.repeat((jnp.arange(len(left)) == q) & there, size)
    for j in range(size):
        block = _eliminate(i * size + j, block, q * size + j, floor, there[q])
    return block._replace(
        left=block.left & ~own,
        scores=jnp.where(own, score, block.scores),
        last=jnp.where(there[q], score, block.last),
    )


def _eliminate(
    i: Int[Array, ""],
    block: _Block,
    q: Int[Array, ""],
    floor: Float[Array, " B"],
    where: Bool[Array, ""],
) -> _Block:
    """Removes weight ``q`` if ``where`` is true; the other weights compensate for it."""
    row = block.inverse[q] - jnp.sum(block.panel[:, q, None] * block.panel, axis=0)
    pivot = jnp.where(where, jnp.maximum(row[q], floor[q]), 1)
    row = jnp.where(where, row, jnp.zeros_like(row))
    vector = row * lax.rsqrt(pivot)
    parts = vector.reshape(len(block.diagonal), -1)
    return block._replace(
        panel=block.panel.at[i].set(vector),
        diagonal=block.diagonal - parts[:, :, None] * parts[:, None, :],
        weights=block.weights - row * (block.weights[q] / pivot),
    )


def _cheapest(
    costs: Float[Array, " k"], left: Bool[Array, " k"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The first of the cheapest that are left, and its cost; NaN if a cost is NaN.

    XLA for a CPU does not vectorize ``argmin``; two minima take a sixth of its time.
    """
    costs = jnp.where(left, costs, jnp.full_like(costs, jnp.inf))
    cost = jnp.min(costs)
    places = jnp.where(left & ~(costs > cost), jnp.arange(len(costs)), len(costs) - 1)
    return jnp.min(places), cost


def _diagonal_blocks(matrix: Float[Array, "B B"], *, size: int) -> Float[Array, "k g g"]:
    """The ``g x g`` blocks along the diagonal."""
    count = len(matrix) // size
    blocks = matrix.reshape(count, size, count, size)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)


def _at_least(cost: Float[Array, ""], last: Float[Array, ""]) -> Float[Array, ""]:
    """The cost, raised to just above the last score if it is lower, so a cut keeps the order."""
    return jnp.maximum(cost, last * (1 + 2 * jnp.finfo(last.dtype).eps))
