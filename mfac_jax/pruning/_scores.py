"""Scores by name, for every pattern.

A score is a function of what is :class:`Given`, in ``SCORES``. The weights in it are turned
so that those of a group are neighbours (see :mod:`mfac_jax.pruning._patterns`). All weights
of a group that goes as a whole have the same score; in an N:M pattern the weights that are
never to go score inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mfac_jax import algebra
from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse import BlockRun, Blocks, block_runs, invert_blocks, map_blocks
from mfac_jax.pruning._greedy import greedy_records
from mfac_jax.pruning._groups import (
    MOST_CHOICES,
    cheapest_choice,
    choices_of,
    group_saliency,
    lowest_in_groups,
)
from mfac_jax.pruning._patterns import Grouping, NofM, Slices, Unstructured
from mfac_jax.pruning._saliency import magnitude, obd_saliency, saliency_by
from mfac_jax.rows import GradientRows

# Blocks whose inverse is worked on as a matrix of B x B; larger ones are not.
LARGEST_GREEDY = 2048


class Given(NamedTuple):
    """What a score is worked out from.

    Attributes:
        weights: a tree.
        rows: their gradients.
        damping: ``lambda``.
        alive: which weights are there, a tree of booleans.
        blocks: which blocks the Fisher has.
        grouping: which weights can only go together.
        diagonal: of the inverse over the alive weights, where the score needs it.
    """

    weights: PyTree
    rows: GradientRows
    damping: Float[Array, ""]
    alive: PyTree
    blocks: Blocks
    grouping: Grouping
    diagonal: PyTree | None = None


_GroupScore = Callable[..., Float[Array, "b B"]]


def _magnitude_score(given: Given) -> PyTree:
    wide = jax.tree.map(lambda w: w.astype(given.rows.dtype), given.weights)
    single = magnitude(wide, mask=given.alive)
    if not given.grouping.goes_whole:
        return _of_weights(single, given)
    squares = jax.tree.map(lambda leaf: leaf * leaf, single)
    return jax.tree.map(jnp.sqrt, _of_weights(squares, given))


def _obd_score(given: Given) -> PyTree:
    single = obd_saliency(given.weights, given.rows, given.damping, mask=given.alive)
    return _of_weights(single, given)


def needs_diagonal(score: str, grouping: Grouping) -> bool:
    """Whether a score wants the diagonal of the inverse over the alive weights."""
    return score == "mfac" and isinstance(grouping.pattern, Unstructured)


def _mfac_score(given: Given) -> PyTree:
    if needs_diagonal("mfac", given.grouping):
        return saliency_by(given.diagonal, given.weights, given.alive)
    return _of_groups(given)


def _greedy_score(given: Given) -> PyTree:
    size, pattern = given.grouping.size, given.grouping.pattern
    quota = pattern.removable if isinstance(pattern, NofM) else None

    def records(
        batch: Float[Array, "b n B"], w: Float[Array, "b B"], here: Bool[Array, "b B"]
    ) -> Float[Array, "b B"]:
        batch, floor = _alive_only(batch, here, given.damping)
        inverse = invert_blocks(batch, given.damping).diagonal_blocks(w.shape[1])[:, 0]
        return greedy_records(inverse, w, here, floor, size=size, quota=quota)

    layout = given.rows.layout
    runs = block_runs(layout, given.blocks)
    return layout.unflatten(map_blocks(given.rows, runs, records, *_flat(given)))


SCORES = {
    "mfac": _mfac_score,
    "greedy": _greedy_score,
    "obd": _obd_score,
    "magnitude": _magnitude_score,
}


def check_score(score: str, layout: Layout, blocks: Blocks, grouping: Grouping) -> None:
    """Score, blocks and pattern go together.

    Raises:
        ValueError: they do not.
    """
    pattern, size = grouping.pattern, grouping.size
    runs = block_runs(layout, blocks)
    if score not in ("mfac", "greedy"):
        return
    if isinstance(pattern, Slices) and not (blocks is None or blocks == "leaf"):
        raise ValueError(
            f"the groups of {pattern} lie in no smaller block than a leaf: "
            f"expected blocks=None or blocks='leaf', got blocks={blocks!r}."
        )
    if not isinstance(pattern, Slices) and any(run.size % size for run in runs):
        raise ValueError(
            f"blocks must hold whole groups of {pattern}: expected sizes that are multiples "
            f"of {size}, got blocks={blocks!r}."
        )
    largest = max((run.size for run in runs), default=0)
    if score == "greedy" and (isinstance(pattern, Slices) or largest > LARGEST_GREEDY):
        raise ValueError(
            "score='greedy' removes weight by weight inside blocks of up to "
            f"{LARGEST_GREEDY} weights, got blocks={blocks!r} with {pattern}; blocks=128 is a "
            "good choice."
        )


def _of_weights(single: PyTree, given: Given) -> PyTree:
    """Scores of a pattern from scores of single weights: sums, or the lowest of a group."""
    grouping, pattern = given.grouping, given.grouping.pattern
    if isinstance(pattern, Unstructured):
        return single
    whole = isinstance(pattern, Slices)

    def of_leaf(scores: Array, here: Array) -> Array:
        shape = scores.shape
        if not scores.size:
            return scores
        if isinstance(pattern, NofM):
            groups = scores.reshape(-1, pattern.m)
            lowest = lowest_in_groups(groups, here.reshape(groups.shape), pattern.removable)
            return lowest.reshape(shape)
        groups = scores.reshape(shape[0], -1) if whole else scores.reshape(-1, grouping.size)
        return jnp.broadcast_to(jnp.sum(groups, 1, keepdims=True), groups.shape).reshape(shape)

    return jax.tree.map(of_leaf, single, given.alive)


def _of_groups(given: Given) -> PyTree:
    """The exact saliency of every group."""
    rows, grouping, damping = given.rows, given.grouping, given.damping
    layout, flat = rows.layout, _flat(given)
    runs = block_runs(layout, given.blocks)
    is_whole = len(runs) == 1 and runs[0].count == 1 and runs[0].size > rows.num_rows
    if not is_whole and not isinstance(grouping.pattern, Slices):
        return layout.unflatten(map_blocks(rows, runs, _in_blocks(damping, grouping), *flat))
    parts = []
    starts = _starts(layout.sizes)
    of_leaf = [
        BlockRun(start, total // size, size) if size else BlockRun(start, 0, 1)
        for start, total, size in zip(starts, layout.sizes, grouping.sizes, strict=True)
    ]
    every = range(len(of_leaf))
    for scope in [[i] for i in every] if given.blocks == "leaf" else [list(every)]:
        if given.blocks == "leaf" and 0 < layout.sizes[scope[0]] <= rows.num_rows:
            # The side of the block is the smaller one, and free of cancellation.
            leaf = BlockRun(starts[scope[0]], 1, layout.sizes[scope[0]])
            own = grouping._replace(sizes=(grouping.sizes[scope[0]],))
            parts.append(map_blocks(rows, (leaf,), _in_blocks(damping, own), *flat))
            continue
        leaves, treedef = jax.tree.flatten(given.alive)
        within = [leaf & (i in scope) for i, leaf in enumerate(leaves)]
        gram = rows.gram(jax.tree.unflatten(treedef, within))
        function = _by_whole_inverse(gram, damping, grouping)
        here = tuple(of_leaf[i] for i in scope if of_leaf[i].count)
        parts.append(map_blocks(rows, here, function, *flat))
    return layout.unflatten(jnp.concatenate(parts))


def _in_blocks(damping: Float[Array, ""], grouping: Grouping) -> _GroupScore:
    """Scores of the groups in blocks whose own inverse is taken."""
    size = grouping.size

    def scores(
        batch: Float[Array, "b n B"], w: Float[Array, "b B"], here: Bool[Array, "b B"]
    ) -> Float[Array, "b B"]:
        batch, floor = _alive_only(batch, here, damping)
        inverse = invert_blocks(batch, damping).diagonal_blocks(size)
        cut = (w.shape[0], -1, size)
        out = _score_groups(
            inverse, w.reshape(cut), here.reshape(cut), floor.reshape(cut), grouping
        )
        return out.reshape(w.shape)

    return scores


def _by_whole_inverse(
    gram: Float[Array, "n n"], damping: Float[Array, ""], grouping: Grouping
) -> _GroupScore:
    """Scores of groups, a block each, under the inverse that ``A = n lambda I + gram`` gives.

    A group of up to n weights, or one that does not go whole, by
    ``[F^-1]_QQ = (I - W_Q^T W_Q) / lambda``, a larger one by

        lambda / 2 (|w_Q|^2 + u^T (A - G_Q G_Q^T)^-1 u),   u = G_Q w_Q.
    """
    n = gram.shape[0]
    shift = n * damping
    inverse_lower = algebra.inverse_lower(algebra.factor(gram, shift))

    def scores(
        batch: Float[Array, "b n g"], w: Float[Array, "b g"], here: Bool[Array, "b g"]
    ) -> Float[Array, "b g"]:
        batch, floor = _alive_only(batch, here, damping)
        if w.shape[1] > n and grouping.goes_whole:
            own = jnp.einsum("bng,bmg->bnm", batch, batch, precision="highest")
            dots = jnp.einsum("bng,bg->bn", batch, w, precision="highest")
            root = algebra.inverse_root(jnp.broadcast_to(gram, own.shape) - own, shift)
            half = jnp.einsum("bnm,bm->bn", root, dots, precision="highest")
            cost = damping / 2 * (jnp.sum(w * w, axis=1) + jnp.sum(half * half, axis=1))
            return jnp.broadcast_to(cost[:, None], w.shape)
        whitened = jnp.einsum("nm,bmg->bng", inverse_lower, batch, precision="highest")
        inner = jnp.einsum("bng,bnh->bgh", whitened, whitened, precision="highest")
        eye = jnp.broadcast_to(jnp.eye(w.shape[1], dtype=w.dtype), inner.shape)
        inverse = (eye - inner) / damping
        return _score_groups(inverse, w, here, floor, grouping)

    return scores


def _score_groups(
    inverse: Float[Array, "*b g g"],
    w: Float[Array, "*b g"],
    here: Bool[Array, "*b g"],
    floor: Float[Array, "*b g"],
    grouping: Grouping,
) -> Float[Array, "*b g"]:
    pattern = grouping.pattern
    if not isinstance(pattern, NofM):
        cost = group_saliency(inverse, w, floor)
        return jnp.broadcast_to(cost[..., None], w.shape)
    if choices_of(pattern.n, pattern.m) <= MOST_CHOICES:
        return cheapest_choice(inverse, w, here, floor, pattern.n)
    size, shape = pattern.m, w.shape
    return greedy_records(
        inverse.reshape(-1, size, size),
        w.reshape(-1, size),
        here.reshape(-1, size),
        floor.reshape(-1, size),
        size=size,
        quota=pattern.removable,
    ).reshape(shape)


def _alive_only(
    batch: Float[Array, "b n B"], here: Bool[Array, "b B"], damping: Float[Array, ""]
) -> tuple[Float[Array, "b n B"], Float[Array, "b B"]]:
    """The gradients of the alive weights, and ``1 / F_jj``, which no pivot is below."""
    batch = jnp.where(here[:, None], batch, jnp.zeros_like(batch))
    return batch, 1 / (damping + jnp.sum(batch * batch, axis=1) / batch.shape[1])


def _flat(given: Given) -> tuple[Float[Array, " d"], Bool[Array, " d"]]:
    flat = given.rows.layout.flatten(given.weights, given.rows.dtype, "weights")
    here = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(given.alive)])
    return jnp.where(here, flat, jnp.zeros_like(flat)), here


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
