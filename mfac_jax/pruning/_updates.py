"""Updates: how the weights that stay make up for those that go.

Q is the set of weights to prune, S the set to keep; both are alive before the step,
and ``F = lambda I + G^T G / n`` is the Fisher over the alive weights. Every update has
``delta_Q = -w_Q`` and nothing elsewhere but on S:

- *removal*: ``delta_S = 0``;
- *reference*: the single-weight updates of Optimal Brain Surgeon added up as if they
  did not interact, ``delta_S = -(F^-1 v)_S`` with ``v_q = w_q / [F^-1]_qq`` (on Q), as
  the paper's code does;
- *joint*: the exact minimiser of ``1/2 delta^T F delta``,

      delta_S = F_SS^-1 F_SQ w_Q = G_S^T (n lambda I + G_S G_S^T)^-1 G_Q w_Q.

The reference's update is of the same form, ``G^T A^-1 G x`` on S, with all alive weights
in ``A`` and ``x = v / lambda``. By the push-through identity

    G^T (n lambda I + G G^T)^-1 u = (lambda I + G^T G / n)^-1 G^T u / n

a block of B <= n weights is solved as B x B, a larger one (and the whole network, by
scans) as n x n. Neither side subtracts anything.

An update is a function ``(w_Q, rows, damping, alive, kept, blocks) -> delta`` in
``UPDATES``, of which the part on S counts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mfac_jax import algebra
from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse import (
    BlockRun,
    Blocks,
    block_ihvp,
    block_runs,
    inverse_diagonal,
    map_blocks,
    whole_diagonal,
)
from mfac_jax.pruning._inputs import as_damping
from mfac_jax.pruning._outputs import as_static
from mfac_jax.rows import GradientRows, check_rows


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
        rows: ``G``; their gradients.
        damping: ``lambda > 0``; a number or a scalar array.
        mask: which weights are alive, a tree of booleans like ``params``; the others
            count as 0.
        new_mask: which of them stay alive.
        blocks: which blocks the Fisher has; see :func:`mfac_jax.fisher_inverse`.

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
    return _checked("joint", params, rows, damping, mask, new_mask, blocks)


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

    It equals :func:`joint_update` if one weight is pruned (in each block), and takes
    the same arguments, with the same result and errors.

    Reference: Frantar, Kurtic, Alistarh, NeurIPS 2021, section 4.1, and the pruner of
    the published code, which cuts its blocks out of the alive weights, as
    :func:`prune_step` does; here blocks hold what lies in them, alive or not.
    """
    return _checked("reference", params, rows, damping, mask, new_mask, blocks)


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
    """``1/2 delta^T F delta`` in one scan; block-diagonal ``F`` with ``blocks``.

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
    rows.layout.check(update, "update")
    lam = as_damping(damping, rows)
    curvature, square = quadratic_terms(update, rows, blocks=as_static(blocks, rows.layout))
    return (curvature + lam * square) / 2


@functools.partial(jax.jit, static_argnames="blocks")
def quadratic_terms(
    update: PyTree, rows: GradientRows, *, blocks: Blocks
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``delta^T (G^T G / n) delta`` and ``delta^T delta``."""
    runs = block_runs(rows.layout, blocks)
    flat = rows.layout.flatten(update, rows.dtype, "update")
    square = jnp.sum(flat * flat)
    if _is_scanned(rows, runs):
        dots = rows.dots(update)
        return jnp.sum(dots * dots) / rows.num_rows, square

    def curvature(batch: Float[Array, "b n B"], here: Float[Array, "b B"]) -> Float[Array, "b 1"]:
        dots = jnp.einsum("bnj,bj->bn", batch, here, precision="highest")
        return jnp.sum(dots * dots, axis=1, keepdims=True)

    return jnp.sum(map_blocks(rows, runs, curvature, flat)) / rows.num_rows, square


def _checked(
    name: str,
    params: PyTree,
    rows: GradientRows,
    damping: ArrayLike,
    mask: PyTree,
    new_mask: PyTree,
    blocks: Blocks,
) -> PyTree:
    check_rows(rows)
    rows.layout.check(params, "params")
    rows.layout.check_mask(mask)
    rows.layout.check_mask(new_mask, "new_mask")
    lam = as_damping(damping, rows)
    blocks = as_static(blocks, rows.layout)
    return full_update(params, rows, lam, mask, new_mask, update=name, blocks=blocks)


@functools.partial(jax.jit, static_argnames=("update", "blocks"))
def full_update(
    params: PyTree,
    rows: GradientRows,
    damping: Float[Array, ""],
    mask: PyTree,
    new_mask: PyTree,
    *,
    update: str,
    blocks: Blocks,
) -> PyTree:
    """``delta`` on S, Q and elsewhere, by the update of that name."""
    layout = rows.layout

    def tree(leaves: list[Array]) -> PyTree:
        return jax.tree_util.tree_unflatten(layout.treedef, leaves)

    alive, wanted = tree(layout.check_mask(mask)), tree(layout.check_mask(new_mask))
    kept = jax.tree.map(jnp.logical_and, alive, wanted)
    wide = jax.tree.map(lambda w: jnp.asarray(w).astype(rows.dtype), params)
    removed = removal(wide, alive, kept)
    gone = jax.tree.map(jnp.negative, removed)
    moved = UPDATES[update](gone, rows, damping, alive, kept, blocks)
    return jax.tree.map(lambda keep, m, r: jnp.where(keep, m, r), kept, moved, removed)


def _no_move(
    gone: PyTree,
    rows: GradientRows,
    damping: Float[Array, ""],
    alive: PyTree,
    kept: PyTree,
    blocks: Blocks,
) -> PyTree:
    del rows, damping, alive, kept, blocks
    return jax.tree.map(jnp.zeros_like, gone)


def _joint_move(
    gone: PyTree,
    rows: GradientRows,
    damping: Float[Array, ""],
    alive: PyTree,
    kept: PyTree,
    blocks: Blocks,
) -> PyTree:
    del alive
    return _compensate(gone, rows, damping, kept, blocks)


def _reference_move(
    gone: PyTree,
    rows: GradientRows,
    damping: Float[Array, ""],
    alive: PyTree,
    kept: PyTree,
    blocks: Blocks,
) -> PyTree:
    del kept

    # -F^-1 v on S, where v is 0, is the compensation over all alive weights for v / lambda.
    def scaled(diagonal: PyTree) -> PyTree:
        return jax.tree.map(lambda w, d: w / (d * damping), gone, diagonal)

    if not _is_scanned(rows, block_runs(rows.layout, blocks)):
        diagonal = inverse_diagonal(rows, damping, blocks=blocks, mask=alive)
        return _compensate(scaled(diagonal), rows, damping, alive, blocks)
    gram = rows.gram(alive)
    factor = algebra.factor(gram, rows.num_rows * damping)
    dots = rows.dots(scaled(whole_diagonal(rows, damping, factor, alive)))
    return rows.combine(_solve(factor, gram, dots))


UPDATES = {"joint": _joint_move, "reference": _reference_move, "none": _no_move}


def _compensate(
    x: PyTree, rows: GradientRows, damping: Float[Array, ""], over: PyTree, blocks: Blocks
) -> PyTree:
    """``G_K^T (n lambda I + G_K G_K^T)^-1 G x`` for the weights K where ``over`` is true."""
    layout, n = rows.layout, rows.num_rows
    runs = block_runs(layout, blocks)
    if _is_scanned(rows, runs):
        gram = rows.gram(over)
        return rows.combine(_solve(algebra.factor(gram, n * damping), gram, rows.dots(x)))
    flat_x = layout.flatten(x, rows.dtype, "x")
    flat_over = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(over)])

    def block(
        gradients: Float[Array, "b n B"], here: Bool[Array, "b B"], part: Float[Array, "b B"]
    ) -> Float[Array, "b B"]:
        dots = jnp.einsum("bnj,bj->bn", gradients, part, precision="highest")
        kept = jnp.where(here[:, None], gradients, jnp.zeros_like(gradients))
        if kept.shape[2] > n:
            gram = jnp.einsum("bnj,bmj->bnm", kept, kept, precision="highest")
            factor = jax.vmap(algebra.factor, (0, None))(gram, n * damping)
            dots = jax.vmap(_solve)(factor, gram, dots)
            return jnp.einsum("bn,bnj->bj", dots, kept, precision="highest")
        rhs = jnp.einsum("bn,bnj->bj", dots, kept, precision="highest") / n
        return block_ihvp(kept, rhs, damping, rows.implementation)

    return layout.unflatten(map_blocks(rows, runs, block, flat_over, flat_x))


def _solve(
    factor: algebra.Factor, gram: Float[Array, "n n"], dots: Float[Array, " n"]
) -> Float[Array, " n"]:
    """``A^-1 u``, to be met by ``G^T`` of the gradients of ``K``."""
    shared = algebra.share_between_equal_rows(gram, dots)
    solved = algebra.solve(factor, shared)
    return algebra.share_between_equal_rows(gram, solved)


def _is_scanned(rows: GradientRows, runs: tuple[BlockRun, ...]) -> bool:
    """One block that is larger than n: it is worked on by scans, never copied."""
    return len(runs) == 1 and runs[0].count == 1 and runs[0].size > rows.num_rows
