"""One pruning step: scores, mask and update."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.inverse._inverse import products_suffice
from mfac_jax.pruning._blocks import FisherBlocks, WithinOutputs, blocks_under, cut_into_blocks
from mfac_jax.pruning._finite import check_finite, check_finite_gradients
from mfac_jax.pruning._functions import name_of
from mfac_jax.pruning._masks import choose, num_pruned
from mfac_jax.pruning._problem import Grams, Problem
from mfac_jax.pruning._scope import Scope, Selection, check_scope, select
from mfac_jax.pruning._scores import Score, ScoreFn, as_score, check_score, scores_of
from mfac_jax.pruning._targets import Target, target_of
from mfac_jax.pruning._updates import Update, UpdateFn, as_update, curvature_along, delta_of
from mfac_jax.rows import Blocks, GradientRows, Partition
from mfac_jax.rows._base import check_columns, check_rows


class PruneInfo(NamedTuple):
    """What one step did to the prunable weights.

    Attributes:
        accepted: whether the step was taken. A step is refused if its update has NaN or Inf
            in it, or if it would prune a weight whose score is not finite. The parameters and
            the mask then stay as before. Under ``jit``, which cannot raise errors, weights or
            gradients that are not finite lead to a refused step. Scalar bool.
        num_pruned: the number of pruned weights after the step; scalar int32.
        num_alive: the number of alive weights after the step; scalar int32.
        predicted_loss_increase: ``1/2 delta^T F delta`` of the update before it is scaled,
            with the damping; scalar.
        undamped_loss_increase: the same without the damping, ``|G delta|^2 / (2 n)``; scalar.
        update_norm: ``|delta_S|``, the norm of the change of the weights that stay; scalar.
        removed_norm: ``|w_Q|``, the norm of the pruned weights; scalar.
    """

    accepted: Bool[Array, ""]
    num_pruned: Int[Array, ""]
    num_alive: Int[Array, ""]
    predicted_loss_increase: Float[Array, ""]
    undamped_loss_increase: Float[Array, ""]
    update_norm: Float[Array, ""]
    removed_norm: Float[Array, ""]


def prune_step(
    params: PyTree,
    mask: PyTree,
    rows: GradientRows,
    sparsity: ArrayLike | PyTree,
    *,
    damping: ArrayLike,
    score: str | ScoreFn | Score = "mfac",
    update: str | UpdateFn | Update = "joint",
    blocks: Blocks | WithinOutputs = None,
    step_scale: ArrayLike = 1.0,
    scope: Scope = Scope(),  # noqa: B008  (immutable)
) -> tuple[PyTree, PyTree, PruneInfo]:
    """Prunes to ``sparsity`` and updates the weights that stay.

    Only the leaves in ``scope`` take part. Sparsity is a fraction of their weights, the Fisher
    and its blocks cover these leaves, and all other leaves are unchanged. One compilation serves
    all sparsities and dampings. The function can also be called under ``jit``.

    Args:
        params: the parameters, a tree of real floating-point arrays.
        mask: the mask so far, from :func:`initial_mask` or an earlier step.
        rows: the gradients of ``params``, for all leaves.
        sparsity: the fraction of prunable weights that are pruned after the step,
            exactly ``round(sparsity * d)`` weights; see :func:`mask_to_sparsity`. Or a tree of
            numbers like ``params``, one for each leaf; it is 0 for leaves that may not be pruned.
            Groups of several weights go as long as the count is not exceeded.
        damping: ``lambda > 0`` of the Fisher; a number or a scalar array.
        score: which weights go.

            - ``"mfac"``: the weights of least :func:`saliency`. The saliency of a group is that
              of all its weights together, ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q``;
            - ``"greedy"``: one weight after another in every block. After each, the other
              weights compensate before the next is chosen. It needs ``blocks``, gives better
              masks and costs O(d B^2);
            - ``"obd"``: the weights of least :func:`obd_saliency`;
            - ``"magnitude"``: the smallest weights;
            - a function ``score(problem)`` of a :class:`Problem` that returns a tree like
              ``params``, or a :class:`Score`; the lowest scores go first.
        update: how the weights that stay compensate: ``"joint"`` for :func:`joint_update`,
            ``"reference"`` for :func:`reference_update`, ``"none"`` for no update; or a function
            ``update(problem, kept)`` that returns the changes of the weights that stay, a tree
            like ``params``; or an :class:`Update`.
        blocks: the blocks of the Fisher: None for one block of all prunable weights, an int for
            blocks of that size, ``"leaf"`` for one block in each parameter,
            :class:`WithinOutputs` for blocks that do not cross the end of an output, or sizes
            that add up to the number of prunable weights. Leaves of several axes are numbered
            output by output, with the weights of a group as neighbours. Blocks of one size and
            blocks within outputs are cut from the alive weights. (Pruned weights keep their
            places in N:M patterns and in blocks of given sizes.)
        step_scale: the factor of the update of the weights that stay.
        scope: what may be pruned, and in which pattern.

    Returns:
        The new parameters in their dtypes, 0 where pruned; the new mask, which revives no
        pruned weight; and a :class:`PruneInfo`.

    Raises:
        TypeError: a leaf is not real floating point, the mask is not boolean, an argument has
            the wrong type, or ``score``, ``update`` or ``blocks`` need columns that the rows
            cannot read.
        ValueError: ``params`` or ``mask`` do not fit the rows, ``sparsity`` lies
            outside [0, 1], below what is pruned already or above what the pattern or the
            layers allow, ``damping`` is not positive, a name is unknown, the blocks do not
            cover the prunable weights, the filter selects nothing, the pattern does not fit a
            leaf, or a part of a group that goes whole is pruned already.
        FloatingPointError: the step is refused because a prunable weight or a gradient has NaN
            or Inf in it. Under ``jit`` there is no error; see :class:`PruneInfo`.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import pruning, rows
        >>> params = {"kernel": jnp.array([[1.0, 0.1], [2.0, 0.5]]), "bias": jnp.zeros(2)}
        >>> gradients = {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}
        >>> params, mask, info = pruning.prune_step(
        ...     params,
        ...     pruning.initial_mask(params),
        ...     rows.as_rows(gradients, params),
        ...     0.25,
        ...     damping=0.01,
        ... )
        >>> params["kernel"]
        Array([[1.033, 0.   ],
               [2.033, 0.533]], dtype=float32)
        >>> int(info.num_pruned), int(info.num_alive)
        (1, 3)
    """
    check_rows(rows)
    check_scope(scope)
    rows.layout.check(params, "params")
    masks = rows.layout.check_mask(mask)
    _checks.positive_scalar(damping, "damping")
    _checks.scalar(step_scale, "step_scale")
    selection = select(scope, params)
    fisher_blocks = cut_into_blocks(blocks, selection)
    check_score(as_score(score), selection, fisher_blocks)
    for reader in column_readers(score, update, fisher_blocks, rows.num_rows):
        check_columns(rows, reader)
    whole_mask = jax.tree.unflatten(rows.layout.treedef, masks)
    target = target_of(sparsity, scope, selection, selection.leaves(whole_mask))
    lam = jnp.asarray(damping).astype(rows.dtype)
    alive = selection.mask(selection.leaves(whole_mask))
    problem = Problem(params, alive, rows, lam, selection, fisher_blocks, Grams(rows))
    keep_layers = not scope.allow_empty_layers
    kept, good = new_mask(problem, selection, as_score(score), target, keep_layers=keep_layers)
    delta = delta_of(as_update(update), problem, kept)
    info = info_of(problem, selection, kept, delta)
    scale = jnp.asarray(step_scale, rows.dtype)
    new, kept, info = _take(selection, params, alive, kept, delta, scale, info, good)
    if not isinstance(info.accepted, jax.core.Tracer) and not bool(info.accepted):
        check_finite(selection.leaves(params), selection.names, "params")
        check_finite_gradients(rows, "rows")
    return new, selection.tree(selection.leaves(kept), whole_mask), info


def step_blocks(
    params: PyTree,
    mask: PyTree,
    blocks: Blocks | WithinOutputs,
    *,
    scope: Scope = Scope(),  # noqa: B008  (immutable)
) -> Partition:
    """The blocks that :func:`prune_step` has, for sums of gradients in them.

    Args:
        params: the parameters.
        mask: the mask of the step.
        blocks: the blocks of the step.
        scope: the scope of the step.

    Returns:
        The blocks, for :class:`mfac_jax.rows.InBlocks`. The next mask moves weights to other
        blocks.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument does not fit ``params``.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import pruning, rows
        >>> w, alive = jnp.array([[1.0, 0.1], [2.0, 0.5]]), jnp.ones((2, 2), bool)
        >>> blocks = pruning.step_blocks(w, alive, 2)
        >>> sums = rows.as_rows(jnp.ones((3, 2, 2)), storage=rows.InBlocks(blocks))
        >>> _, mask, _ = pruning.prune_step(w, alive, sums, 0.25, damping=0.01, blocks=2)
        >>> mask.tolist()
        [[True, False], [True, True]]
    """
    check_scope(scope)
    selection = select(scope, params)
    leaves = selection.layout.check_mask(mask)
    whole = jax.tree.unflatten(selection.layout.treedef, leaves)
    alive = selection.mask(selection.leaves(whole))
    return blocks_under(cut_into_blocks(blocks, selection), selection, alive)


def new_mask(
    problem: Problem, selection: Selection, score: Score, target: Target, *, keep_layers: bool
) -> tuple[PyTree, Bool[Array, ""]]:
    """The mask of the weights that stay, and whether all weights that go have finite scores."""
    return choose(
        scores_of(score, problem),
        problem.mask,
        target.counts,
        selection,
        costs=target.costs,
        keep_layers=keep_layers,
    )


def column_readers(
    score: str | ScoreFn | Score,
    update: str | UpdateFn | Update,
    blocks: FisherBlocks,
    num_rows: int,
) -> list[str]:
    """The score, update or blocks of a step that read columns, in the caller's words."""
    found = []
    if as_score(score).reads_columns:
        found.append(f"score={name_of(score)!r}")
    if as_update(update).reads_columns:
        found.append(f"update={name_of(update)!r}")
    if not products_suffice(num_rows, Partition(None, blocks.runs)):
        whole = f"one block of at most n={num_rows} weights"
        found.append(whole if blocks.given is None else f"blocks={blocks.given!r}")
    return found


def info_of(problem: Problem, selection: Selection, kept: PyTree, delta: PyTree) -> PruneInfo:
    """The norms of an update, and the rise of the loss that the model predicts for it."""
    curvature = curvature_along(delta, problem.rows, problem.blocks)
    return _info(selection.leaves(kept), selection.leaves(delta), curvature, problem.damping)


@jax.jit
def _info(
    kept: tuple[Array, ...],
    delta: tuple[Array, ...],
    curvature: Float[Array, ""],
    damping: Float[Array, ""],
) -> PruneInfo:
    pruned = num_pruned(kept)
    square = _sum([jnp.sum(leaf * leaf) for leaf in delta])
    pairs = list(zip(delta, kept, strict=True))
    return PruneInfo(
        accepted=jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in delta])),
        num_pruned=pruned,
        num_alive=sum(leaf.size for leaf in kept) - pruned,
        predicted_loss_increase=(curvature + damping * square) / 2,
        undamped_loss_increase=curvature / 2,
        update_norm=jnp.sqrt(_sum([jnp.sum(leaf * leaf, where=here) for leaf, here in pairs])),
        removed_norm=jnp.sqrt(_sum([jnp.sum(leaf * leaf, where=~here) for leaf, here in pairs])),
    )


def _take(
    selection: Selection,
    params: PyTree,
    mask: PyTree,
    kept: PyTree,
    delta: PyTree,
    scale: ArrayLike,
    info: PruneInfo,
    good: Bool[Array, ""],
) -> tuple[PyTree, PyTree, PruneInfo]:
    """The new weights and mask if everything is finite, otherwise the old ones."""
    old, old_mask = selection.leaves(params), selection.leaves(mask)
    new_leaves, mask_leaves, info = _take_leaves(
        old, old_mask, selection.leaves(kept), selection.leaves(delta), scale, info, good
    )
    return selection.tree(new_leaves, params), selection.mask(mask_leaves), info


@jax.jit
def _take_leaves(
    params: tuple[Array, ...],
    mask: tuple[Array, ...],
    kept: tuple[Array, ...],
    delta: tuple[Array, ...],
    scale: ArrayLike,
    info: PruneInfo,
    good: Bool[Array, ""],
) -> tuple[tuple[Array, ...], tuple[Array, ...], PruneInfo]:
    moved, finite = _moved(params, kept, delta, scale)
    accepted = info.accepted & good & finite
    mask_out = tuple(jnp.where(accepted, *pair) for pair in zip(kept, mask, strict=True))
    params_out = tuple(jnp.where(accepted, *pair) for pair in zip(moved, params, strict=True))
    pruned = num_pruned(mask_out)
    alive = sum(leaf.size for leaf in mask) - pruned
    return (
        params_out,
        mask_out,
        info._replace(accepted=accepted, num_pruned=pruned, num_alive=alive),
    )


def move(
    selection: Selection, params: PyTree, kept: PyTree, delta: PyTree, scale: ArrayLike
) -> tuple[PyTree, Bool[Array, ""]]:
    """The parameters with ``scale delta`` added to the weights that stay, 0 where pruned.

    Returns:
        The parameters, and whether all prunable leaves are finite.
    """
    leaves, finite = _moved(
        selection.leaves(params), selection.leaves(kept), selection.leaves(delta), scale
    )
    return selection.tree(leaves, params), finite


@jax.jit
def _moved(
    params: tuple[Array, ...],
    kept: tuple[Array, ...],
    delta: tuple[Array, ...],
    scale: ArrayLike,
) -> tuple[tuple[Array, ...], Bool[Array, ""]]:
    moved = tuple(
        jnp.where(k, _add(w, jnp.asarray(scale) * d), jnp.zeros_like(w))
        for k, w, d in zip(kept, params, delta, strict=True)
    )
    return moved, jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in moved]))


def _add(weight: Array, change: Array) -> Array:
    wide = np.promote_types(weight.dtype, change.dtype)
    return (weight.astype(wide) + change.astype(wide)).astype(weight.dtype)


def _sum(terms: list[Array]) -> Array:
    return functools.reduce(jnp.add, terms)
