"""Checks of what scores and updates are given, before any work."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mfac_jax import _checks
from mfac_jax.rows import GradientRows


def as_damping(damping: ArrayLike, rows: GradientRows) -> Float[Array, ""]:
    """A positive damping in the dtype of the products of the rows."""
    _checks.positive_scalar(damping, "damping")
    return jnp.asarray(damping).astype(rows.dtype)
