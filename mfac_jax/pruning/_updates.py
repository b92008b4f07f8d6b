"""Updates: how the weights that stay compensate for the weights that go.

Q is the set of weights to prune and S the set to keep. Both are alive before the step, and
``F = lambda I + G^T G / n`` is the Fisher over the alive weights. Every update has
``delta_Q = -w_Q``. Updates differ in ``delta_S``; elsewhere ``delta`` is 0.

- *none*: ``delta_S = 0``.
- *reference*: the single-weight updates of Optimal Brain Surgeon, added up as if they did not
  interact: ``delta_S = -(F^-1 v)_S`` with ``v_q = w_q / [F^-1]_qq`` on Q, as in the paper's code.
- *joint*: the exact minimiser of ``1/2 delta^T F delta``,

      delta_S = F_SS^-1 F_SQ w_Q = G_S^T (n lambda I + G_S G_S^T)^-1 G_Q w_Q.

The reference's update has the same form, ``G^T A^-1 G x`` on S, with all alive weights in ``A``
and ``x = v / lambda``. Neither subtracts anything.

An update is a function ``update(problem, kept) -> changes`` of a
:class:`mfac_jax.pruning.Problem` and a mask of the weights that stay. It returns a tree like the
parameters, whose entries are added to the weights that stay. Its other entries are not used. An
:class:`Update` also says what the function needs. :data:`UPDATES` holds the updates that have a
name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse import fisher_inverse
from mfac_jax.inverse._inverse import uses_products
from mfac_jax.pruning._functions import ProblemFunction, as_kind, call
from mfac_jax.pruning._problem import Problem, removed_weights
from mfac_jax.rows import Blocks, GradientRows, Partition, partition
from mfac_jax.rows._base import check_columns, check_rows

UpdateFn = Callable[[Problem, PyTree], PyTree]


def joint_update(
    params: PyTree,
    rows: GradientRows,
    damping: ArrayLike,
    mask: PyTree,
    new_mask: PyTree,
    *,
    blocks: Blocks = None,
) -> PyTree:
    """The update of least ``1/2 delta^T F delta`` that prunes several weights at once.

    O(d n^2 + n^3) whole, by one masked Gram matrix and two scans; O(d n min(n, B)) in
    blocks.

    Args:
        params: ``w``; a tree of real floating-point arrays.
        rows: ``G``; the gradients of ``params``.
        damping: ``lambda > 0``; a number or a scalar array.
        mask: which weights are alive, a tree of booleans like ``params``; other weights
            count as 0.
        new_mask: which alive weights stay alive.
        blocks: the blocks of the Fisher; see :func:`mfac_jax.fisher_inverse`.

    Returns:
        ``delta``, a tree like ``params`` in the accumulation dtype of the rows; it is
        ``-w`` where a weight is pruned and 0 where none was alive.

    Raises:
        TypeError: a leaf is not real floating point, a mask is not boolean, or an
            argument has the wrong type.
        ValueError: ``params`` or a mask do not fit the rows, ``damping`` is not
            positive, or the blocks do not cover d.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import pruning, rows
        >>> gradients = rows.as_rows(jnp.array([[1.0, 1.0]]))
        >>> w, alive, kept = jnp.ones(2), jnp.ones(2, bool), jnp.array([True, False])
        >>> pruning.joint_update(w, gradients, 0.25, alive, kept)
        Array([ 0.8, -1. ], dtype=float32)
    """
    alive, kept = _masks(params, rows, mask, new_mask)
    removed = removed_weights(params, alive, kept, dtype=rows.dtype)
    inverse = fisher_inverse(rows, damping, mask=kept, blocks=blocks)
    return as_delta(inverse.compensate(removed), removed, kept)


def reference_update(
    params: PyTree,
    rows: GradientRows,
    damping: ArrayLike,
    mask: PyTree,
    new_mask: PyTree,
    *,
    blocks: Blocks = None,
) -> PyTree:
    """The update of the paper's code: single-weight updates added up.

    The arguments, results and errors are those of :func:`joint_update`. If one weight is pruned
    (in each block), the two updates are equal.

    Reference: Frantar, Kurtic, Alistarh, NeurIPS 2021, section 4.1, and the pruner of
    the published code. That pruner cuts its blocks from the alive weights, as
    :func:`prune_step` does. Here blocks hold consecutive weights, alive and pruned.
    """
    alive, kept = _masks(params, rows, mask, new_mask)
    removed = removed_weights(params, alive, kept, dtype=rows.dtype)
    inverse = fisher_inverse(rows, damping, mask=alive, blocks=blocks)
    excess = _excess(removed, inverse.diagonal(), inverse.damping)
    return as_delta(inverse.compensate(excess), removed, kept)


def removal(params: PyTree, mask: PyTree, new_mask: PyTree) -> PyTree:
    """``-w`` where a weight is alive in ``mask`` but not in ``new_mask``, 0 elsewhere.

    Raises:
        TypeError: a leaf is not real floating point, or a mask is not boolean.
        ValueError: a mask does not fit ``params``.
    """
    layout = Layout(params)
    leaves = zip(
        jax.tree.leaves(params),
        layout.check_mask(mask),
        layout.check_mask(new_mask, "new_mask"),
        strict=True,
    )
    removed = [jnp.where(alive & ~kept, -w, jnp.zeros_like(w)) for w, alive, kept in leaves]
    return jax.tree_util.tree_unflatten(layout.treedef, removed)


def predicted_loss_increase(
    update: PyTree, rows: GradientRows, damping: ArrayLike, *, blocks: Blocks = None
) -> Float[Array, ""]:
    """``1/2 delta^T F delta``, in one scan. With ``blocks``, ``F`` is block-diagonal.

    Args:
        update: ``delta``, a tree like the parameters; 0 where no weight is alive.
        rows: ``G``.
        damping: ``lambda > 0``; a number or a scalar array.
        blocks: see :func:`mfac_jax.fisher_inverse`.

    Returns:
        The increase; a scalar.

    Raises:
        TypeError: a leaf is not real floating point, or an argument has the wrong type.
        ValueError: ``update`` does not fit the rows, ``damping`` is not positive, or
            the blocks do not cover d.
    """
    check_rows(rows)
    leaves = rows.layout.check(update, "update")
    _checks.positive_scalar(damping, "damping")
    lam = jnp.asarray(damping).astype(rows.dtype)
    tree = jax.tree.unflatten(rows.layout.treedef, list(map(jnp.asarray, leaves)))
    curvature = curvature_along(tree, rows, partition(rows.layout, blocks))
    return _half_sum(curvature, tree, lam)


def curvature_along(delta: PyTree, rows: GradientRows, blocks: Partition) -> Float[Array, ""]:
    """``delta^T (G^T G / n) delta``, whole or in blocks."""
    if uses_products(rows, blocks):
        return _mean_square(rows.dots(delta), num_rows=rows.num_rows)
    return _sum(check_columns(rows, "blocks").map_blocks(blocks, _block_means, delta))


def _block_means(batch: Float[Array, "b n B"], delta: Float[Array, "b B"]) -> Float[Array, " b"]:
    dots = jnp.einsum("bnj,bj->bn", batch, delta, precision="highest")
    return jnp.sum(dots * dots, axis=1) / batch.shape[1]


@functools.partial(jax.jit, static_argnames="num_rows")
def _mean_square(dots: Float[Array, " n"], *, num_rows: int) -> Float[Array, ""]:
    return jnp.sum(dots * dots) / num_rows


_sum = jax.jit(jnp.sum)


@jax.jit
def _half_sum(
    curvature: Float[Array, ""], delta: PyTree, damping: Float[Array, ""]
) -> Float[Array, ""]:
    squares = [jnp.sum(leaf.astype(damping.dtype) ** 2) for leaf in jax.tree.leaves(delta)]
    return (curvature + damping * functools.reduce(jnp.add, squares)) / 2


def _masks(
    params: PyTree, rows: GradientRows, mask: PyTree, new_mask: PyTree
) -> tuple[PyTree, PyTree]:
    """The masks of the alive weights and of the weights that stay, as full trees."""
    check_rows(rows)
    layout = rows.layout
    layout.check(params, "params")
    alive, kept = layout.check_mask(mask), layout.check_mask(new_mask, "new_mask")
    both = [a & k for a, k in zip(alive, kept, strict=True)]
    return tuple(jax.tree.unflatten(layout.treedef, leaves) for leaves in (alive, both))


@jax.jit
def as_delta(changes: PyTree, removed: PyTree, kept: PyTree) -> PyTree:
    """``delta``: the changes of the weights that stay, and ``-w`` for the weights that go."""
    return jax.tree.map(lambda m, w, k: jnp.where(k, m.astype(w.dtype), -w), changes, removed, kept)


@jax.jit
def _excess(removed: PyTree, diagonal: PyTree, damping: Float[Array, ""]) -> PyTree:
    # -F^-1 v on S, where v is 0, is the compensation over all alive weights for v / lambda.
    return jax.tree.map(lambda w, d: w / (d * damping), removed, diagonal)


@dataclass(frozen=True)
class Update(ProblemFunction):
    """An update, and what a step must know about it before it reads gradients.

    A function ``update(problem, kept)`` of your own is the same as ``Update(update)``.

    Attributes:
        function: ``function(problem, kept)`` of a :class:`Problem` and the mask of the weights
            that stay returns the changes of the weights, a tree like the parameters. Only the
            changes of weights that stay are used.
        reads_columns: whether the function reads columns of the gradients even if the Fisher is
            whole, as :attr:`Problem.diagonal` does. If the gradients have no columns to read,
            there is then an error before any work.

    Raises:
        TypeError: an attribute has another type.
    """


def _joint(problem: Problem, kept: PyTree) -> PyTree:
    return problem.inverse_over(kept).compensate(problem.removed(kept))


def _reference(problem: Problem, kept: PyTree) -> PyTree:
    excess = _excess(problem.removed(kept), problem.diagonal, problem.damping)
    return problem.inverse.compensate(excess)


def _none(problem: Problem, kept: PyTree) -> PyTree:
    return problem.removed(kept)  # 0 on the weights that stay


UPDATES: dict[str, Update] = {
    "joint": Update(_joint),
    "reference": Update(_reference, reads_columns=True),
    "none": Update(_none),
}


def as_update(update: str | UpdateFn | Update) -> Update:
    """The built-in update of a name, or the caller's own update; see :func:`as_kind`."""
    return as_kind(update, "update", UPDATES, Update)


def delta_of(update: Update, problem: Problem, kept: PyTree) -> PyTree:
    """``delta`` for the weights that stay, a tree like the parameters.

    Raises:
        ValueError: the caller's own update returns another structure or shape.
        TypeError: it does not return real numbers.
    """
    changes = call(update, problem.rows.layout, "changes", problem, kept)
    return as_delta(changes, problem.removed(kept), kept)
