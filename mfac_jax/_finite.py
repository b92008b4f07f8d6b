"""Which leaves are finite: one program and one read of the device for all leaves."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool


def finite_leaves(leaves: Sequence[Array]) -> Bool[np.ndarray, " leaves"]:
    """Whether each leaf is finite. While a caller is traced, all leaves count as finite."""
    found = _are_finite(tuple(leaves))
    if any(isinstance(finite, jax.core.Tracer) for finite in found):
        return np.ones(len(found), bool)
    return np.asarray(jax.device_get(found), bool)


@jax.jit
def _are_finite(leaves: tuple[Array, ...]) -> list[Bool[Array, ""]]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
