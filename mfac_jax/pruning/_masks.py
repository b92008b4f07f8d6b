"""Turns scores into a mask that prunes an exact number of weights.

The k lowest scores lie below a threshold. Floats map to integers of the same order, and each bit
of the threshold takes one count over the weights. Coordinates break ties between equal scores,
also bit by bit. Counts are sums of integers. Leaves are therefore never concatenated, sharded
leaves are never gathered, and no count is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.pruning._scope import Selection, as_leaf, in_groups

# A traced sparsity is taken as a multiple of 2^-24, the resolution of float32 in [0.5, 1].
_FRACTION_BITS = 24
_HALF_BITS = _FRACTION_BITS // 2
MOST_WEIGHTS = 2**31 - 1


def initial_mask(params: PyTree) -> PyTree:
    """The mask in which every weight is alive: a tree of booleans like ``params``."""
    return jax.tree.map(lambda leaf: jax.device_put(np.ones(np.shape(leaf), bool)), params)


def mask_to_sparsity(scores: PyTree, mask: PyTree, sparsity: ArrayLike) -> PyTree:
    """Prunes the lowest scores until ``round(sparsity * d)`` weights are pruned in all.

    Args:
        scores: a tree of real arrays with d entries in all; low scores go first.
        mask: a tree of booleans with the structure of ``scores``, true where a weight is
            alive. Pruned weights stay pruned.
        sparsity: the fraction that is pruned after the step, in [0, 1]. The count is computed in
            double precision. A traced sparsity is clipped to [0, 1] (NaN is 0) and rounded to
            24 binary places, for which the count is exact.

    Returns:
        The new mask. Weights of equal scores go in the order of their coordinates. Scores that
        are not finite go last. If more weights are pruned already, the result is ``mask``.

    Raises:
        ValueError: ``sparsity`` lies outside [0, 1], or, outside ``jit``, below what ``mask``
            has pruned already; the trees do not fit; or there are more scores than int32 can
            count.
        TypeError: ``sparsity`` is not a number, scores are not real floating point,
            or the mask is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax.pruning import mask_to_sparsity
        >>> mask_to_sparsity(jnp.array([3.0, 1.0, 1.0, 1.0]), jnp.ones(4, bool), 0.5)
        Array([ True, False, False,  True], dtype=bool)
    """
    layout = Layout(scores, "scores")
    layout.check_mask(mask)
    count = pruned_count(sparsity, layout.size)
    check_not_revived(mask, layout, sparsity, "sparsity")
    return _mask_to_count(scores, mask, count)


def mask_to_count(scores: PyTree, mask: PyTree, count: ArrayLike) -> PyTree:
    """Prunes the lowest scores until ``count`` weights are pruned in all.

    Args:
        scores: as in :func:`mask_to_sparsity`.
        mask: as in :func:`mask_to_sparsity`.
        count: the number of pruned weights after the step, 0 .. d; an int or an integer
            scalar array, which may be traced.

    Returns:
        The new mask, as from :func:`mask_to_sparsity`.

    Raises:
        ValueError: ``count`` is out of range or, outside ``jit``, below what is pruned already;
            the trees do not fit; or there are more scores than int32 can count.
        TypeError: ``count`` is not an integer, scores are not real floating point, or the mask
            is not boolean.
    """
    layout = Layout(scores, "scores")
    layout.check_mask(mask)
    _check_countable(layout.size)
    _checks.index(count, "count", layout.size + 1)
    if jnp.shape(count) != ():
        raise ValueError(f"count must be a scalar, got an array of shape {jnp.shape(count)}.")
    check_not_revived(mask, layout, count, "count")
    return _mask_to_count(scores, mask, jnp.asarray(count, jnp.int32))


def pruned_count(sparsity: ArrayLike, total: int) -> Int[Array, ""]:
    """``round(sparsity * total)`` with one rounding, halves to even.

    Float32 cannot hold every count above 2^24. A traced sparsity is therefore written as
    ``q / 2^24`` and multiplied by ``total`` in integers, 12 bits at a time.
    """
    _checks.unit_interval(sparsity, "sparsity")
    _check_countable(total)
    if not isinstance(sparsity, jax.core.Tracer):
        return jnp.asarray(round(float(np.asarray(sparsity)) * total), jnp.int32)
    fraction = jnp.where(sparsity > 0, jnp.minimum(sparsity, 1), jnp.zeros_like(sparsity))
    if fraction.dtype == jnp.float64:
        return jnp.round(fraction * total).astype(jnp.int32)
    scaled = fraction.astype(jnp.float32) * jnp.float32(2**_FRACTION_BITS)
    q = jnp.round(scaled).astype(jnp.uint32)
    ones = jnp.uint32(2**_HALF_BITS - 1)
    q_high, q_low = q >> _HALF_BITS, q & ones
    n_high, n_low = jnp.uint32(total >> _HALF_BITS), jnp.uint32(total) & ones
    low = q_low * n_low
    middle = q_high * n_low + q_low * n_high + (low >> _HALF_BITS)
    whole = q_high * n_high + (middle >> _HALF_BITS)
    rest = ((middle & ones) << _HALF_BITS) | (low & ones)
    half = jnp.uint32(2 ** (_FRACTION_BITS - 1))
    up = (rest > half) | ((rest == half) & (whole % 2 == 1))
    return (whole + up.astype(jnp.uint32)).astype(jnp.int32)


def _check_countable(total: int) -> None:
    if total > MOST_WEIGHTS:
        raise ValueError(f"at most {MOST_WEIGHTS} weights can be counted, got {total}.")


def num_pruned(mask: PyTree) -> Int[Array, ""]:
    """How many entries of a mask are false."""
    leaves = [jnp.sum(~leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(mask)]
    return functools.reduce(jnp.add, leaves, jnp.zeros((), jnp.int32))


def pruned_of_leaves(mask: Sequence[Array]) -> list[int]:
    """How many entries of each leaf of a known mask are false."""
    # Counts a known mask immediately, even while a caller is traced.
    with jax.ensure_compile_time_eval():
        return [int(count) for count in jax.device_get(_pruned_of_leaves(tuple(mask)))]


@jax.jit
def _pruned_of_leaves(mask: tuple[Array, ...]) -> list[Int[Array, ""]]:
    return [jnp.sum(~leaf, dtype=jnp.int32) for leaf in mask]


def check_not_revived(mask: PyTree, layout: Layout, target: ArrayLike, name: str) -> None:
    """Checks that a known target is not below what a known mask has pruned.

    Raises:
        ValueError: the target is below it.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in [target, *jax.tree.leaves(mask)]):
        return
    total, number = layout.size, np.asarray(target)
    count = int(number) if name == "count" else round(float(number) * total)
    already = sum(pruned_of_leaves(layout.check_mask(mask)))
    if count < already:
        raise ValueError(
            f"{name} must not lie below what is pruned already, since pruned weights stay "
            f"pruned: expected at least {already} of {total} weights, "
            f"got {name}={target} ({count} weights)."
        )


@functools.partial(jax.jit, static_argnames="costs")
def _mask_to_count(
    scores: PyTree, mask: PyTree, count: Int[Array, "*layers"], *, costs: tuple[int, ...] = ()
) -> PyTree:
    """The new mask.

    Args:
        scores: a tree of real arrays.
        mask: a tree of booleans like ``scores``.
        count: the largest total cost of pruned entries; or one such number for each leaf.
        costs: the cost of an entry of each leaf; 1 by default.

    Returns:
        The mask. Entries go in the order of their scores, and in the order of coordinates if
        scores are equal, as long as the total does not exceed ``count``.
    """
    layout = Layout(scores, "scores")
    if not layout.size:
        return mask
    alive = layout.check_mask(mask)
    dtype = functools.reduce(np.promote_types, layout.dtypes, np.dtype(np.float32))
    keys = [
        _order_key(jnp.asarray(leaf).astype(dtype), here)
        for leaf, here in zip(jax.tree.leaves(scores), alive, strict=True)
    ]
    costs = costs or (1,) * len(keys)
    return jax.tree_util.tree_unflatten(layout.treedef, _above_count(keys, alive, count, costs))


def _above_count(
    keys: Sequence[Array],
    alive: Sequence[Array],
    count: Int[Array, "*layers"],
    costs: tuple[int, ...],
) -> list[Array]:
    """Which entries stay: those above a threshold, ordered by key and then by place.

    No two entries have the same key and place. The threshold is found bit by bit: first the bits
    of the key, then the bits of the place. Nothing is sorted, and no prefix sum is needed.
    """
    sizes = [key.size for key in keys]
    unsigned = keys[0].dtype
    bits, place_bits = jnp.iinfo(unsigned).bits, sum(sizes).bit_length()
    places = [
        jnp.arange(start, start + key.size, dtype=jnp.uint32).reshape(key.shape)
        for start, key in zip(np.cumsum([0, *sizes]), keys, strict=False)
    ]
    # Each leaf has its own threshold, or all have one.
    own = range(len(keys)) if count.ndim else [...] * len(keys)

    def below(first: Array, second: Array) -> list[Array]:
        return [
            (key < first[i]) | ((key == first[i]) & (place < second[i]))
            for i, key, place in zip(own, keys, places, strict=True)
        ]

    def total(entries: Sequence[Array]) -> Int[Array, "*layers"]:
        counts = [
            cost * jnp.sum(leaf, dtype=jnp.int32) for leaf, cost in zip(entries, costs, strict=True)
        ]
        return jnp.stack(counts) if count.ndim else functools.reduce(jnp.add, counts)

    count = jnp.maximum(count, total([~here for here in alive]))

    def set_bit(i: Int[Array, ""], found: tuple[Array, Array]) -> tuple[Array, Array]:
        first, second = found
        of_key = i < bits
        shift = jnp.where(of_key, bits - 1 - i, bits + place_bits - 1 - i)
        higher = (
            jnp.where(of_key, first | (jnp.ones((), unsigned) << shift.astype(unsigned)), first),
            jnp.where(of_key, second, second | (jnp.uint32(1) << shift.astype(jnp.uint32))),
        )
        # Entries whose key equals the threshold go one by one, in the order of their places.
        pruned = total(below(*higher))
        fits = jnp.where(of_key, pruned < count, pruned <= count)
        return jnp.where(fits, higher[0], first), jnp.where(fits, higher[1], second)

    start = jnp.zeros(count.shape, unsigned), jnp.zeros(count.shape, jnp.uint32)
    threshold = lax.fori_loop(0, bits + place_bits, set_bit, start)
    return [~pruned for pruned in below(*threshold)]


def choose(
    scores: PyTree,
    mask: PyTree,
    counts: Int[Array, "*layers"],
    selection: Selection,
    *,
    costs: tuple[int, ...],
    keep_layers: bool,
) -> tuple[PyTree, Bool[Array, ""]]:
    """The new mask: the groups of lowest score go, in all layers together or in each layer.

    Args:
        scores: a tree like the parameters. The weights of a group that goes whole share one
            score.
        mask: the mask so far, like the parameters. A group is alive if one of its weights is.
        counts: the largest total cost of pruned weights; or one such number for each prunable
            leaf. Groups go as long as the total does not exceed it.
        selection: which leaves are prunable, and the groups in them.
        costs: the cost of a weight in each prunable leaf.
        keep_layers: whether the best group of every leaf stays, even if ``counts`` (of a traced
            sparsity) would remove it.

    Returns:
        The new mask, false in leaves that are not prunable; and whether all weights that go
        have finite scores. Groups of equal scores go in the order of the pattern.
    """
    whole = selection.pattern.prunes_whole_groups
    kept, good = _choose(
        selection.leaves(scores),
        selection.leaves(mask),
        counts,
        selection.leaf_orders if whole and selection.has_groups else (),
        groups=selection.group_sizes if whole else (1,) * len(selection.sizes),
        costs=costs,
        keep_layers=keep_layers and whole,
    )
    return selection.mask(kept), good


@functools.partial(jax.jit, static_argnames=("groups", "costs", "keep_layers"))
def _choose(
    scores: tuple[Array, ...],
    alive: tuple[Array, ...],
    counts: Int[Array, "*layers"],
    orders: tuple[Array | None, ...],
    *,
    groups: tuple[int, ...],
    costs: tuple[int, ...],
    keep_layers: bool,
) -> tuple[tuple[Array, ...], Bool[Array, ""]]:
    orders = orders or (None,) * len(groups)
    # Leaves whose weights go one by one keep their shape, and therefore their sharding.
    values = [
        leaf if g == 1 or not leaf.size else in_groups(leaf, order, g)[:, 0]
        for leaf, order, g in zip(scores, orders, groups, strict=True)
    ]
    there = [
        leaf if g == 1 or not leaf.size else jnp.any(in_groups(leaf, order, g), axis=1)
        for leaf, order, g in zip(alive, orders, groups, strict=True)
    ]
    weights = tuple(g * c for g, c in zip(groups, costs, strict=True))
    ranked = values
    if keep_layers:
        ranked = [_keep_best(v, t) for v, t in zip(values, there, strict=True)]
        pairs = zip(weights, there, strict=True)
        most = [w * (t.size - jnp.any(t).astype(jnp.int32)) for w, t in pairs]
        counts = jnp.minimum(counts, jnp.stack(most) if counts.ndim else sum(most))
    if not counts.ndim and len(set(weights)) > 1:  # rank by the score of a unit of cost
        ranked = [v / w for v, w in zip(ranked, weights, strict=True)]
    stay = _mask_to_count(ranked, there, counts, costs=weights)
    bad = [jnp.any(t & ~s & ~jnp.isfinite(v)) for t, s, v in zip(there, stay, values, strict=True)]
    kept = [
        s if g == 1 or not leaf.size else as_leaf(jnp.repeat(s, g), order, leaf.shape)
        for s, leaf, order, g in zip(stay, alive, orders, groups, strict=True)
    ]
    new = tuple(leaf & k for leaf, k in zip(alive, kept, strict=True))
    return new, ~jnp.any(jnp.stack(bad))


def _keep_best(scores: Float[Array, "*k"], alive: Bool[Array, "*k"]) -> Float[Array, "*k"]:
    """The scores, with infinity for the best group, which then goes last."""
    if not scores.size:
        return scores
    best = jnp.argmax(jnp.where(alive, scores, jnp.full_like(scores, -jnp.inf)))
    place = jnp.arange(scores.size, dtype=best.dtype).reshape(scores.shape)
    return jnp.where(place == best, jnp.full_like(scores, jnp.inf), scores)


def _order_key(
    scores: Float[Array, "*shape"], alive: Bool[Array, "*shape"]
) -> UInt[Array, "*shape"]:
    """Integers in the order of the scores: 0 for pruned weights, the largest for NaN and Inf."""
    bits = jnp.finfo(scores.dtype).bits
    unsigned = jnp.uint64 if bits == 64 else jnp.uint32
    top = jnp.full_like(scores, jnp.inf)
    scores = jnp.where(jnp.isfinite(scores), scores, top)
    # -0.0 and 0.0 are the same score.
    scores = jnp.where(scores == 0, jnp.zeros_like(scores), scores)
    raw = lax.bitcast_convert_type(scores, unsigned)
    sign = unsigned(1 << (bits - 1))
    key = jnp.where(raw >= sign, ~raw, raw | sign)
    return jnp.where(alive, key, jnp.zeros_like(key))
