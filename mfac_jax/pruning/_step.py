"""One pruning step: scores, mask and update in one compiled function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.inverse import Blocks
from mfac_jax.pruning._filters import PathFilter, prunable
from mfac_jax.pruning._inputs import as_damping, as_static
from mfac_jax.pruning._masks import check_not_revived, mask_to_count, num_pruned, pruned_count
from mfac_jax.pruning._saliency import SCORES
from mfac_jax.pruning._updates import UPDATES, full_update, quadratic_terms
from mfac_jax.rows import GradientRows, SelectedRows, check_rows


class PruneInfo(NamedTuple):
    """What one step did to the prunable weights.

    Attributes:
        accepted: whether the step was taken. A step whose update has NaN or Inf in it,
            or that would prune a weight whose score is not finite, is not: parameters
            and mask are as before. Scalar bool.
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
    sparsity: ArrayLike,
    *,
    damping: ArrayLike,
    score: str = "mfac",
    update: str = "joint",
    blocks: Blocks = None,
    path_filter: PathFilter = None,
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
            exactly ``round(sparsity * d)`` of them; see :func:`mask_to_sparsity`.
        damping: ``lambda > 0`` of the Fisher; a number or a scalar array.
        score: ``"mfac"`` for :func:`saliency`, ``"magnitude"`` for :func:`magnitude`.
        update: ``"joint"`` for :func:`joint_update`, ``"reference"`` for
            :func:`reference_update`, ``"none"`` for none.
        blocks: which blocks the Fisher has: None for one of all prunable weights, an
            int for blocks of that size, ``"leaf"`` for one a parameter, or sizes that
            add up to the number of prunable weights.
        path_filter: which leaves may be pruned; see :func:`prunable`.

    Returns:
        The new parameters in their dtypes, 0 where pruned; the new mask, in which
        nothing that was pruned is revived; and a :class:`PruneInfo`.

    Raises:
        TypeError: a leaf is not real floating point, the mask is not boolean, or an
            argument has the wrong type.
        ValueError: ``params`` or ``mask`` do not fit the rows, ``sparsity`` lies
            outside [0, 1] or below what is pruned already, ``damping`` is not positive,
            ``score`` or ``update`` is unknown, the blocks do not cover the prunable
            weights, or the filter selects nothing.

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
    keep = tuple(jax.tree.leaves(prunable(params, path_filter)))
    selected = SelectedRows.of(rows, keep)
    blocks = as_static(blocks, selected)
    count = pruned_count(sparsity, selected.layout.size)
    masks = _select(mask_leaves, keep)
    check_not_revived(masks, selected.layout, sparsity, "sparsity")
    weights, masks, info = _step(
        _select(leaves, keep),
        masks,
        selected,
        count,
        lam,
        score=score,
        update=update,
        blocks=blocks,
    )

    def tree(whole: list[Array], part: tuple[Array, ...]) -> PyTree:
        new = iter(part)
        merged = [next(new) if kept else leaf for leaf, kept in zip(whole, keep, strict=True)]
        return jax.tree_util.tree_unflatten(layout.treedef, merged)

    return tree(leaves, weights), tree(mask_leaves, masks), info


@functools.partial(jax.jit, static_argnames=("score", "update", "blocks"))
def _step(
    params: tuple[Array, ...],
    mask: tuple[Array, ...],
    rows: SelectedRows,
    count: Int[Array, ""],
    damping: Float[Array, ""],
    *,
    score: str,
    update: str,
    blocks: Blocks,
) -> tuple[tuple[Array, ...], tuple[Array, ...], PruneInfo]:
    scores = SCORES[score](params, rows, damping, mask, blocks)
    new_mask = mask_to_count(scores, mask, count)
    delta = full_update(params, rows, damping, mask, new_mask, update=update, blocks=blocks)
    curvature, square = quadratic_terms(delta, rows, blocks=blocks)
    wrong = [
        (old & ~new & ~jnp.isfinite(s)) | ~jnp.isfinite(d)
        for old, new, s, d in zip(mask, new_mask, scores, delta, strict=True)
    ]
    accepted = ~jnp.any(jnp.stack([jnp.any(leaf) for leaf in wrong]))
    moved = [
        jnp.where(new, _add(w, d), jnp.zeros_like(w))
        for new, w, d in zip(new_mask, params, delta, strict=True)
    ]
    mask_out = tuple(jnp.where(accepted, *pair) for pair in zip(new_mask, mask, strict=True))
    params_out = tuple(jnp.where(accepted, *pair) for pair in zip(moved, params, strict=True))
    pruned = num_pruned(mask_out)
    info = PruneInfo(
        accepted=accepted,
        num_pruned=pruned,
        num_alive=rows.layout.size - pruned,
        predicted_loss_increase=(curvature + damping * square) / 2,
        undamped_loss_increase=curvature / 2,
        update_norm=_norm(delta, new_mask),
        removed_norm=_norm(delta, [~leaf for leaf in new_mask]),
    )
    return params_out, mask_out, info


def _select(leaves: list[Array], keep: tuple[bool, ...]) -> tuple[Array, ...]:
    return tuple(jnp.asarray(leaf) for leaf, kept in zip(leaves, keep, strict=True) if kept)


def _add(weight: Array, change: Array) -> Array:
    wide = np.promote_types(weight.dtype, change.dtype)
    return (weight.astype(wide) + change.astype(wide)).astype(weight.dtype)


def _norm(delta: tuple[Array, ...], where: Sequence[Array]) -> Float[Array, ""]:
    squares = [jnp.sum(leaf * leaf, where=here) for leaf, here in zip(delta, where, strict=True)]
    return jnp.sqrt(functools.reduce(jnp.add, squares))
