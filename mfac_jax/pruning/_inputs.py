"""Checks of what scores and updates are given."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.rows import GradientRows


def as_damping(damping: ArrayLike, rows: GradientRows) -> Float[Array, ""]:
    """A positive damping in the dtype of the products of the rows."""
    _checks.positive_scalar(damping, "damping")
    return jnp.asarray(damping).astype(rows.dtype)


def check_finite(tree: PyTree, paths: Sequence[str], name: str) -> None:
    """Raises a FloatingPointError that names the leaf by its path, if NaN or Inf is in one."""
    for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise FloatingPointError(f"{name}{path} has NaN or Inf in it.")
