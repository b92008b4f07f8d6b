"""Checks for NaN and Inf; the errors name the leaf and the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mfac_jax._finite import finite_leaves
from mfac_jax._layout import PyTree
from mfac_jax.rows import GradientRows


def check_finite(tree: PyTree, paths: Sequence[str], name: str) -> None:
    """Checks that all leaves are finite.

    Args:
        tree: the leaves.
        paths: the path of each leaf.
        name: what the error calls the tree.

    Raises:
        FloatingPointError: a leaf has NaN or Inf in it; the error names the first one.
    """
    for path, finite in zip(paths, finite_leaves(jax.tree.leaves(tree)), strict=True):
        if not finite:
            raise FloatingPointError(f"{name}{path} has NaN or Inf in it.")


def check_finite_gradients(rows: GradientRows, name: str) -> None:
    """Checks that gradients are finite and can be squared.

    Leaves that are not prunable are checked as well: products with the gradients read all leaves.

    Args:
        rows: the gradients.
        name: what the error calls them.

    Raises:
        FloatingPointError: a gradient fails; the error names the first such leaf, and the first
            row that fails there.
    """
    if not rows.has_products:
        return
    # A sum with coefficients of one sign keeps NaN and Inf. Because the coefficients differ, large
    # gradients do not cancel.
    coefficients = np.arange(1, rows.num_rows + 1) / rows.num_rows
    sums = rows.combine(jnp.asarray(coefficients.astype(rows.dtype)))
    finite = finite_leaves(_squared(sums))
    if finite.all():
        return
    leaf = int(np.argmin(finite))
    masks = [np.full(shape, i == leaf) for i, shape in enumerate(rows.layout.shapes)]
    mask = jax.tree.unflatten(rows.layout.treedef, list(map(jnp.asarray, masks)))
    squares = np.diagonal(np.asarray(rows.gram(mask)))
    bad = np.flatnonzero(~np.isfinite(squares))
    which = f"gradient {bad[0]} of {name}" if bad.size else f"the sum of all {name}"
    raise FloatingPointError(
        f"{which} must be finite and small enough to square; got NaN, Inf or numbers too large to "
        f"square in params{rows.layout.paths[leaf]}."
    )


@jax.jit
def _squared(tree: PyTree) -> list[Array]:
    return [jnp.square(leaf) for leaf in jax.tree.leaves(tree)]
