"""One pruning step: scores, mask and update in one compiled function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.inverse import Blocks, inverse_diagonal
from mfac_jax.pruning._arrange import Arrangement, Cut
from mfac_jax.pruning._budgets import target_of
from mfac_jax.pruning._filters import PathFilter, prunable
from mfac_jax.pruning._inputs import as_damping, check_finite, check_finite_gradients
from mfac_jax.pruning._masks import num_pruned, select
from mfac_jax.pruning._outputs import WithinOutputs, cut
from mfac_jax.pruning._patterns import (
    Grouping,
    NofM,
    Pattern,
    Unstructured,
    check_pattern,
    group,
)
from mfac_jax.pruning._scores import SCORES, Given, check_score, needs_diagonal
from mfac_jax.pruning._updates import UPDATES, full_update
from mfac_jax.rows import (
    GradientRows,
    SelectedRows,
    check_rows,
    transposed,
    transposed_back,
)


class PruneInfo(NamedTuple):
    """What one step did to the prunable weights.

    Attributes:
        accepted: whether the step was taken. A step whose update has NaN or Inf in it,
            or that would prune a weight whose score is not finite, is not: parameters
            and mask are as before. Under ``jit``, where nothing can be raised, that is so with
            weights and gradients that are not finite. Scalar bool.
        num_pruned: weights that are pruned after the step; scalar int32.
        num_alive: those that are not; scalar int32.
        predicted_loss_increase: ``1/2 delta^T F delta`` for the update that was worked
            out, the damping included; scalar.
        undamped_loss_increase: the part of it without damping, ``|G delta|^2 / (2 n)``.
        update_norm: ``|delta_S|``, how far the weights that stay are moved; scalar.
        removed_norm: ``|w_Q|``, the size of what is pruned; scalar.
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
    score: str = "mfac",
    update: str = "joint",
    blocks: Blocks | WithinOutputs = None,
    step_scale: ArrayLike = 1.0,
    path_filter: PathFilter = None,
    pattern: Pattern = Unstructured(),  # noqa: B008  (immutable)
    budget: str = "global",
    costs: PyTree | None = None,
    allow_empty_layers: bool = False,
    output_axis: int = -1,
) -> tuple[PyTree, PyTree, PruneInfo]:
    """Prunes to ``sparsity`` and updates the weights that stay.

    Only the leaves that ``path_filter`` selects take part: sparsity is a fraction of
    their weights, the Fisher and its blocks run over them alone, and all other leaves
    come back as they are. The function is compiled once for all sparsities and
    dampings; it can be called under ``jit`` as well.

    Args:
        params: the parameters, a tree of real floating-point arrays.
        mask: the mask so far, from :func:`initial_mask` or an earlier step.
        rows: the gradients of ``params``, all leaves of it.
        sparsity: the fraction of prunable weights that are pruned after the step,
            exactly ``round(sparsity * d)`` of them; see :func:`mask_to_sparsity`. Or a
            tree of numbers like ``params``, one a leaf, 0 for leaves that may not be pruned.
            Groups of several weights go while the number is not exceeded.
        damping: ``lambda > 0`` of the Fisher; a number or a scalar array.
        score: which weights go.

            - ``"mfac"``: those of least :func:`saliency`, groups by that of all their
              weights together, ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q``;
            - ``"greedy"``: one after another in every block, the others making up for each
              before the next is chosen; needs ``blocks``. Better masks, O(d B^2);
            - ``"obd"``: those of least :func:`obd_saliency`;
            - ``"magnitude"``: the smallest.
        update: ``"joint"`` for :func:`joint_update`, ``"reference"`` for
            :func:`reference_update`, ``"none"`` for none.
        blocks: which blocks the Fisher has: None for one of all prunable weights, an
            int for blocks of that size, ``"leaf"`` for one a parameter,
            :class:`WithinOutputs` for blocks that do not cross the end of an output, or sizes
            that add up to the number of prunable weights. In a leaf of several axes coordinates
            are numbered output by output, and so that the weights of a group are neighbours.
            Pruned weights make room: blocks of one size, and those within outputs, are cut out
            of the alive ones (but in N:M patterns, and where sizes are given).
        step_scale: what the update of the weights that stay is multiplied by.
        path_filter: which leaves may be pruned; see :func:`prunable`.
        pattern: which weights can only go together: :class:`Unstructured`,
            :class:`NofM`, :class:`BlocksOf` or :class:`Slices`.
        budget: where ``sparsity`` holds, if it is one number: ``"global"``, in all leaves
            together; ``"uniform"``, in each; ``"erk"``, in each by the Erdos-Renyi kernel.
        costs: a tree of positive ints like ``params``: what a weight of each leaf costs,
            for example in multiplications. Sparsity is then the fraction of the cost, and
            weights are ranked by score over cost. With the global budget only.
        allow_empty_layers: whether a leaf may lose all of its weights.
        output_axis: the axis of the outputs in leaves of several axes: -1 in Flax, 0 where
            kernels are as in PyTorch or Equinox.

    Returns:
        The new parameters in their dtypes, 0 where pruned; the new mask, in which
        nothing that was pruned is revived; and a :class:`PruneInfo`.

    Raises:
        TypeError: a leaf is not real floating point, the mask is not boolean, or an
            argument has the wrong type.
        ValueError: ``params`` or ``mask`` do not fit the rows, ``sparsity`` lies
            outside [0, 1], below what is pruned already or above what ``pattern`` or the
            layers allow, ``damping`` is not positive, a name is unknown, the blocks do not
            cover the prunable weights, the filter selects nothing, the pattern does not fit a
            leaf, or of a group that goes as a whole a part is pruned already.
        FloatingPointError: a prunable weight or its gradients have NaN or Inf in them, and keep
            the step from being taken (not under ``jit``: see :class:`PruneInfo`).

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
    layout = rows.layout
    leaves = layout.check(params, "params")
    mask_leaves = layout.check_mask(mask)
    lam = as_damping(damping, rows)
    _checks.one_of(score, "score", tuple(SCORES))
    _checks.one_of(update, "update", tuple(UPDATES))
    check_pattern(pattern)
    keep = tuple(jax.tree.leaves(prunable(params, path_filter)))
    selected = SelectedRows.of(rows, keep)
    names = [path for path, kept in zip(layout.paths, keep, strict=True) if kept]
    grouping = group(pattern, selected.layout, names, output_axis)
    pieces = cut(blocks, selected.layout, grouping)
    check_score(score, selected.layout, pieces.blocks, grouping)
    weights, masks = narrow(leaves, keep), narrow(mask_leaves, keep)
    target = target_of(
        sparsity,
        budget,
        selected.layout,
        grouping,
        layout=layout,
        keep=keep,
        costs=costs,
        allow_empty_layers=allow_empty_layers,
        mask=masks,
    )
    problem = Problem(weights, masks, selected, lam, pieces, grouping).ready_for(score, update)
    # Compiled one by one: as one program, XLA would keep what they all read of the rows.
    new_masks, good = choose(
        problem,
        target.counts,
        score=score,
        costs=target.costs,
        keep_layers=not allow_empty_layers,
    )
    delta, info = work_out(problem, new_masks, update=update)
    scale = jnp.asarray(step_scale, selected.dtype)
    new_weights, new_masks, info = _take(weights, masks, new_masks, delta, scale, info, good)
    if not isinstance(info.accepted, jax.core.Tracer) and not bool(info.accepted):
        check_finite(weights, names, "params")
        check_finite_gradients(selected, names)

    def tree(whole: list[Array], part: tuple[Array, ...]) -> PyTree:
        return jax.tree_util.tree_unflatten(layout.treedef, merge(whole, part, keep))

    return tree(leaves, new_weights), tree(mask_leaves, new_masks), info


@jax.jit
def _take(
    params: tuple[Array, ...],
    mask: tuple[Array, ...],
    new_mask: tuple[Array, ...],
    delta: tuple[Array, ...],
    scale: Float[Array, ""],
    info: PruneInfo,
    scores_good: Bool[Array, ""],
) -> tuple[tuple[Array, ...], tuple[Array, ...], PruneInfo]:
    """The new weights and mask if all is finite, the old ones if not."""
    moved = move(params, new_mask, delta, scale)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in moved])
    accepted = info.accepted & scores_good & jnp.all(finite)
    mask_out = tuple(jnp.where(accepted, *pair) for pair in zip(new_mask, mask, strict=True))
    params_out = tuple(jnp.where(accepted, *pair) for pair in zip(moved, params, strict=True))
    pruned = num_pruned(mask_out)
    alive = sum(leaf.size for leaf in mask) - pruned
    info = info._replace(accepted=accepted, num_pruned=pruned, num_alive=alive)
    return params_out, mask_out, info


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """What a step starts from; a pytree.

    Attributes:
        weights: the prunable leaves.
        mask: which of them are alive.
        rows: their gradients.
        damping: ``lambda``.
        pieces: how the Fisher is cut (static).
        grouping: which weights can only go together (static).
        diagonal: of the inverse over the alive weights, arranged; None where nobody needs it.
    """

    weights: tuple[Array, ...]
    mask: tuple[Array, ...]
    rows: GradientRows
    damping: Float[Array, ""]
    pieces: Cut = field(metadata={"static": True})
    grouping: Grouping = field(metadata={"static": True})
    diagonal: PyTree | None = None

    def ready_for(self, score: str, update: str) -> Problem:
        """The problem with the diagonal, if the score or the update needs it."""
        needed = needs_diagonal(score, self.grouping) or UPDATES[update].needs_diagonal
        if self.diagonal is not None or not needed:
            return self
        return dataclasses.replace(self, diagonal=_diagonal(self))

    def arrangement(self) -> Arrangement:
        """The order in which it is worked on."""
        return Arrangement(self.rows, self.mask, self.grouping, self.pieces)


@jax.jit
def _diagonal(problem: Problem) -> PyTree:
    order = problem.arrangement()
    return inverse_diagonal(
        order.rows,
        problem.damping,
        blocks=problem.pieces.blocks,
        mask=order.arranged(problem.mask),
    )


def choose(
    problem: Problem,
    counts: Int[Array, "*layers"],
    *,
    score: str,
    costs: tuple[int, ...],
    keep_layers: bool,
) -> tuple[tuple[Array, ...], Bool[Array, ""]]:
    """The new mask, and whether the scores of all that goes are finite."""
    grouping = problem.grouping
    return _select(
        _scores(problem, score=score),
        problem.mask,
        counts,
        orders=grouping.orders,
        groups=grouping.sizes if grouping.goes_whole else (1,) * len(grouping.sizes),
        costs=costs,
        keep_layers=keep_layers and not isinstance(grouping.pattern, NofM),
    )


@functools.partial(jax.jit, static_argnames="score")
def _scores(problem: Problem, *, score: str) -> tuple[Array, ...]:
    """The scores, turned."""
    order = problem.arrangement()
    given = Given(
        order.arranged(problem.weights),
        order.rows,
        problem.damping,
        order.arranged(problem.mask),
        problem.pieces.blocks,
        order.grouping,
        problem.diagonal,
    )
    return order.as_turned(SCORES[score](given))


# By itself, so that it is compiled once for all scores.
@functools.partial(jax.jit, static_argnames=("orders", "groups", "costs", "keep_layers"))
def _select(
    scores: tuple[Array, ...],
    mask: tuple[Array, ...],
    counts: Int[Array, "*layers"],
    *,
    orders: tuple[tuple[int, ...], ...],
    groups: tuple[int, ...],
    costs: tuple[int, ...],
    keep_layers: bool,
) -> tuple[tuple[Array, ...], Bool[Array, ""]]:
    alive = transposed(mask, orders)
    kept = select(scores, alive, counts, groups=groups, costs=costs, keep_layers=keep_layers)
    bad = [
        jnp.any(old & ~new & ~jnp.isfinite(s))
        for old, new, s in zip(alive, kept, scores, strict=True)
    ]
    return transposed_back(kept, orders), ~jnp.any(jnp.stack(bad))


@functools.partial(jax.jit, static_argnames="update")
def work_out(
    problem: Problem, new_mask: tuple[Array, ...], *, update: str
) -> tuple[tuple[Array, ...], PruneInfo]:
    """``delta`` for a new mask, and what it means."""
    order = problem.arrangement()
    arranged, curvature = full_update(
        order.arranged(problem.weights),
        order.rows,
        problem.damping,
        order.arranged(problem.mask),
        order.arranged(new_mask),
        problem.diagonal,
        update=update,
        blocks=problem.pieces.blocks,
    )
    delta = order.back(order.as_turned(arranged))
    square = functools.reduce(jnp.add, [jnp.sum(leaf * leaf) for leaf in delta])
    pruned = num_pruned(new_mask)
    info = PruneInfo(
        accepted=jnp.all(jnp.stack([jnp.all(jnp.isfinite(change)) for change in delta])),
        num_pruned=pruned,
        num_alive=problem.rows.layout.size - pruned,
        predicted_loss_increase=(curvature + problem.damping * square) / 2,
        undamped_loss_increase=curvature / 2,
        update_norm=_norm(delta, new_mask),
        removed_norm=_norm(delta, [~leaf for leaf in new_mask]),
    )
    return delta, info


@jax.jit
def move(
    params: Sequence[Array],
    mask: Sequence[Array],
    delta: Sequence[Array],
    scale: Float[Array, ""],
) -> tuple[Array, ...]:
    """The weights with ``scale delta`` added where they stay, 0 elsewhere."""
    return tuple(
        jnp.where(new, _add(w, scale * d), jnp.zeros_like(w))
        for new, w, d in zip(mask, params, delta, strict=True)
    )


def narrow(leaves: Sequence[Array], keep: Sequence[bool]) -> tuple[Array, ...]:
    """The selected leaves."""
    return tuple(jnp.asarray(leaf) for leaf, kept in zip(leaves, keep, strict=True) if kept)


def merge(leaves: Sequence[Array], selected: Sequence[Array], keep: Sequence[bool]) -> list[Array]:
    """All leaves, the selected ones replaced."""
    new = iter(selected)
    return [next(new) if kept else leaf for leaf, kept in zip(leaves, keep, strict=True)]


def _add(weight: Array, change: Array) -> Array:
    wide = np.promote_types(weight.dtype, change.dtype)
    return (weight.astype(wide) + change.astype(wide)).astype(weight.dtype)


def _norm(delta: tuple[Array, ...], where: Sequence[Array]) -> Float[Array, ""]:
    squares = [jnp.sum(leaf * leaf, where=here) for leaf, here in zip(delta, where, strict=True)]
    return jnp.sqrt(functools.reduce(jnp.add, squares))
