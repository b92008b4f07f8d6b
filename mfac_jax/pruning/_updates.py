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

So an entry of ``UPDATES`` returns ``x`` and the weights that ``G`` has here, elementwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
)
from mfac_jax.pruning._inputs import as_damping
from mfac_jax.pruning._outputs import as_static
from mfac_jax.rows import GradientRows, Implementation, check_rows


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
    diagonal = None
    if UPDATES[name].needs_diagonal:
        diagonal = inverse_diagonal(rows, lam, blocks=blocks, mask=mask)
    return full_update(params, rows, lam, mask, new_mask, diagonal, update=name, blocks=blocks)[0]


class _Update(NamedTuple):
    """One way to make up for what goes.

    Attributes:
        system: ``(w_Q, alive, kept, diagonal, damping) -> (x, K)``, elementwise; None moves
            nothing.
        needs_diagonal: whether it wants the diagonal of the inverse over the alive weights.
    """

    system: Callable[..., tuple[Array, Array]] | None
    needs_diagonal: bool = False


def _joint_system(
    gone: Array, alive: Array, kept: Array, diagonal: Array | None, damping: Float[Array, ""]
) -> tuple[Array, Array]:
    del alive, diagonal, damping
    return gone, kept


def _reference_system(
    gone: Array, alive: Array, kept: Array, diagonal: Array, damping: Float[Array, ""]
) -> tuple[Array, Array]:
    del kept
    # -F^-1 v on S, where v is 0, is the compensation over all alive weights for v / lambda.
    return gone / (diagonal * damping), alive


UPDATES = {
    "joint": _Update(_joint_system),
    "reference": _Update(_reference_system, needs_diagonal=True),
    "none": _Update(None),
}


@functools.partial(jax.jit, static_argnames=("update", "blocks"))
def full_update(
    params: PyTree,
    rows: GradientRows,
    damping: Float[Array, ""],
    mask: PyTree,
    new_mask: PyTree,
    diagonal: PyTree | None,
    *,
    update: str,
    blocks: Blocks,
) -> tuple[PyTree, Float[Array, ""]]:
    """``delta`` by the update of that name, and ``delta^T (G^T G / n) delta``.

    Args:
        params: ``w``.
        rows: ``G``.
        damping: ``lambda``.
        mask: which weights are alive.
        new_mask: which of them stay.
        diagonal: of the inverse over the alive weights, where the update needs it.
        update: the name.
        blocks: of the Fisher.
    """
    layout, n, system = rows.layout, rows.num_rows, UPDATES[update].system
    wide = [jnp.asarray(leaf).astype(rows.dtype) for leaf in jax.tree.leaves(params)]
    alive = layout.check_mask(mask)
    kept = [a & k for a, k in zip(alive, layout.check_mask(new_mask), strict=True)]
    gone = [
        jnp.where(a & ~k, w, jnp.zeros_like(w)) for a, k, w in zip(alive, kept, wide, strict=True)
    ]
    known = [gone, kept]
    if system is not None:
        diagonals = [None] * len(gone) if diagonal is None else jax.tree.leaves(diagonal)
        parts = zip(gone, alive, kept, diagonals, strict=True)
        pairs = [system(*part, damping) for part in parts]
        known += [[x for x, _ in pairs], [over for _, over in pairs]]
    runs = block_runs(layout, blocks)

    def tree(leaves: Sequence[Array]) -> PyTree:
        return jax.tree_util.tree_unflatten(layout.treedef, leaves)

    if _is_scanned(rows, runs):
        moved = [jnp.zeros_like(leaf) for leaf in gone]
        if system is not None:
            x, over = known[2:]
            gram = rows.gram(tree(over))
            solved = _solve(algebra.factor(gram, n * damping), gram, rows.dots(tree(x)))
            moved = jax.tree.leaves(rows.combine(solved))
        delta = [jnp.where(k, m, -g) for k, m, g in zip(kept, moved, gone, strict=True)]
        dots = rows.dots(tree(delta))
        return tree(delta), jnp.sum(dots * dots) / n

    def block(
        batch: Float[Array, "b n B"],
        gone: Float[Array, "b B"],
        kept: Bool[Array, "b B"],
        x: Float[Array, "b B"] | None = None,
        over: Bool[Array, "b B"] | None = None,
    ) -> tuple[Float[Array, "b B"], Float[Array, "b 1"]]:
        moved = jnp.zeros_like(gone)
        if x is not None and over is not None:
            moved = _compensate(batch, x, over, damping, rows.implementation)
        delta = jnp.where(kept, moved, -gone)
        dots = jnp.einsum("bnj,bj->bn", batch, delta, precision="highest")
        return delta, jnp.sum(dots * dots, axis=1, keepdims=True)

    flat = [jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]) for leaves in known]
    moves, squares = map_blocks(rows, runs, block, *flat)
    return layout.unflatten(moves), jnp.sum(squares) / n


def _compensate(
    batch: Float[Array, "b n B"],
    x: Float[Array, "b B"],
    over: Bool[Array, "b B"],
    damping: Float[Array, ""],
    implementation: Implementation,
) -> Float[Array, "b B"]:
    """``G_K^T (n lambda I + G_K G_K^T)^-1 G x`` for the weights K of each block, ``over``."""
    n = batch.shape[1]
    dots = jnp.einsum("bnj,bj->bn", batch, x, precision="highest")
    within = jnp.where(over[:, None], batch, jnp.zeros_like(batch))
    if within.shape[2] > n:
        gram = jnp.einsum("bnj,bmj->bnm", within, within, precision="highest")
        factor = jax.vmap(algebra.factor, (0, None))(gram, n * damping)
        dots = jax.vmap(_solve)(factor, gram, dots)
        return jnp.einsum("bn,bnj->bj", dots, within, precision="highest")
    rhs = jnp.einsum("bn,bnj->bj", dots, within, precision="highest") / n
    return block_ihvp(within, rhs, damping, implementation)


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
