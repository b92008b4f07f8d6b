"""Functions of stored inverses of blocks of neighbouring coordinates, run by run."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mfac_jax._layout import Layout, PyTree
from mfac_jax.inverse._coordinates import Pairs
from mfac_jax.inverse._factored import Inverted
from mfac_jax.rows import Partition


@functools.partial(jax.jit, static_argnames=("method", "dtype"))
def call(
    stored: tuple[Inverted, ...],
    blocks: Partition,
    layout: Layout,
    vectors: tuple[PyTree, ...],
    *,
    method: str,
    dtype: jnp.dtype,
) -> Any:
    """Calls a method of all inverted blocks.

    Args:
        stored: the inverses of the blocks of each run.
        blocks: the blocks.
        layout: the parameters.
        vectors: trees whose parts are the arguments of the method.
        method: the name of the method; see :mod:`mfac_jax.inverse._factored`.
        dtype: the dtype of the parts.

    Returns:
        The results, as :meth:`ColumnRows.map_blocks` returns them.
    """
    parts = [blocks.split(vector, dtype) for vector in vectors]
    found = [
        getattr(inverted, method)(*(part[i] for part in parts)) for i, inverted in enumerate(stored)
    ]
    return blocks.join(found, layout)


@jax.jit
def entries(
    stored: tuple[Inverted, ...], blocks: Partition, damping: Float[Array, ""], pairs: Pairs
) -> Float[Array, "..."]:
    """``(F^-1)_ij``, which is 0 between two blocks."""
    zero = jnp.zeros_like(damping)
    out = jnp.where(pairs.valid, zero, jnp.full_like(damping, jnp.nan))
    for part, run in zip(stored, blocks.runs, strict=True):
        block_i, at_i = jnp.divmod(pairs.rows - run.start, run.size)
        block_j, at_j = jnp.divmod(pairs.columns - run.start, run.size)
        inside = (block_i == block_j) & (block_i >= 0) & (block_i < run.count) & pairs.valid
        values = part.entries(jnp.clip(block_i, 0, run.count - 1), at_i, at_j)
        out = jnp.where(inside, values, out)
    return out.reshape(pairs.shape)
