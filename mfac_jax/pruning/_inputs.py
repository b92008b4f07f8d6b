"""Checks of what scores and updates are given."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.rows import GradientRows


def as_damping(damping: ArrayLike, rows: GradientRows) -> Float[Array, ""]:
    """A positive damping in the dtype of the products of the rows."""
    _checks.positive_scalar(damping, "damping")
    return jnp.asarray(damping).astype(rows.dtype)


def check_finite(tree: PyTree, paths: Sequence[str], name: str) -> None:
    """Raises a FloatingPointError that names the leaf by its path, if NaN or Inf is in one."""
    for path, finite in zip(paths, jax.device_get(_are_finite(tree)), strict=True):
        if not finite:
            raise FloatingPointError(f"{name}{path} has NaN or Inf in it.")


def check_finite_gradients(rows: GradientRows, paths: Sequence[str]) -> None:
    """Raises a FloatingPointError if NaN, Inf or what is too large to square is in the rows."""
    check_finite(_squares(rows), paths, "the squared gradients of params")


@jax.jit
def _are_finite(tree: PyTree) -> list[Bool[Array, ""]]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]


@jax.jit
def _squares(rows: GradientRows) -> PyTree:
    return rows.column_square_sums()
