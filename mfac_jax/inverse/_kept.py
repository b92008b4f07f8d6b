"""Stored inverses of blocks of neighbouring coordinates, run by run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mfac_jax._layout import PyTree
from mfac_jax.inverse._block_functions import masked
from mfac_jax.inverse._coordinates import Pairs
from mfac_jax.inverse._factored import Inverted, invert_blocks
from mfac_jax.rows import ColumnRows, GradientRows, Partition
from mfac_jax.rows._map import after, flat_vector, placed


@jax.jit
def inverted_blocks(
    rows: ColumnRows, mask: PyTree | None, damping: Float[Array, ""], blocks: Partition
) -> tuple[Inverted, ...]:
    """Inverts every block, one batch for each run. O(d n min(n, B))."""
    keep = None if mask is None else rows.layout.flat_mask(mask)
    parts: list[Inverted] = []
    for run in blocks.runs:
        columns = rows.columns(run.start, run.width)
        batch = jnp.moveaxis(columns.reshape(rows.num_rows, run.count, run.size), 1, 0)
        if keep is not None:
            here = keep[run.start : run.start + run.width]
            batch = masked(batch, here.reshape(run.count, run.size))
        parts.append(invert_blocks(after(batch, parts[-1:]), damping))
    return tuple(parts)


@functools.partial(jax.jit, static_argnames="function")
def map_kept(
    kept: tuple[Inverted, ...],
    blocks: Partition,
    rows: GradientRows,
    vectors: tuple[PyTree, ...],
    *,
    function: Callable[..., Any],
) -> Any:
    """Applies ``function(inverted, *parts)`` to every run; see :meth:`ColumnRows.map_blocks`."""
    flat = [flat_vector(jax.tree.leaves(vector), rows.dtype) for vector in vectors]
    results = []
    for part, run in zip(kept, blocks.runs, strict=True):
        here = slice(run.start, run.start + run.width)
        cut = [vector[here].reshape(run.count, run.size) for vector in flat]
        results.append(function(part, *cut))
    whole = jnp.concatenate([result.reshape(-1) for result in results])
    if results[0].ndim == 1:
        return whole
    return rows.layout.unflatten(placed(whole, blocks, rows.layout))


@jax.jit
def entries(
    kept: tuple[Inverted, ...], blocks: Partition, damping: Float[Array, ""], pairs: Pairs
) -> Float[Array, "..."]:
    """``(F^-1)_ij``, which is 0 between two blocks."""
    zero = jnp.zeros_like(damping)
    out = jnp.where(pairs.valid, zero, jnp.full_like(damping, jnp.nan))
    for part, run in zip(kept, blocks.runs, strict=True):
        block_i, at_i = jnp.divmod(pairs.rows - run.start, run.size)
        block_j, at_j = jnp.divmod(pairs.columns - run.start, run.size)
        inside = (block_i == block_j) & (block_i >= 0) & (block_i < run.count) & pairs.valid
        values = part.entries(jnp.clip(block_i, 0, run.count - 1), at_i, at_j)
        out = jnp.where(inside, values, out)
    return out.reshape(pairs.shape)
