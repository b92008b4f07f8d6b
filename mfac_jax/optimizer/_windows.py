"""The windows of an optimizer: one for all parameters, or one for each.

A window for each parameter makes the Fisher block-diagonal. Each parameter then has rows and a
Gram matrix of its own. The Gram matrices are one batch (l, m, m), so the algebra of all parameters
is one program. A gradient that is not finite is stored in no window. If the storage of a parameter
rejects a gradient that is finite, this parameter has a zero row in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import window
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows import Storage, WritableRows, is_small_enough
from mfac_jax.rows._base import check_traceable, check_writable
from mfac_jax.window import PushInfo, Window


class LeafWindows(NamedTuple):
    """The most recent gradients of each parameter; immutable.

    Attributes:
        rows: the rows of each parameter, in the order of ``jax.tree.leaves``.
        gram: ``G G^T`` for each parameter; (l, m, m), zero in empty slots.
        stamps: as in :class:`mfac_jax.window.Window`; (m,) int32.
        rejected: the number of gradients that were rejected; scalar int32.
        layout: the parameters.
    """

    rows: tuple[WritableRows, ...]
    gram: Float[Array, "l m m"]
    stamps: Int[Array, " m"]
    rejected: Int[Array, ""]
    layout: Any


Windows = Window | LeafWindows


def init(params: PyTree, window_size: int, storage: Storage, blocks: str | None) -> Windows:
    """Empty windows for gradients of ``params``.

    Args:
        params: the parameters.
        window_size: ``m``.
        storage: how gradients are stored.
        blocks: None for one window of all parameters, ``"leaf"`` for one for each.
    """
    if blocks is None:
        held = window.init(params, window_size, storage=storage)
        check_traceable(held.rows, "a window under jit")
        return held
    rows = tuple(
        check_writable(storage.empty(leaf, window_size), "a window")
        for leaf in jax.tree.leaves(params)
    )
    for part in rows:
        check_traceable(part, "a window under jit")
    dtype = jnp.result_type(*[part.dtype for part in rows]) if rows else jnp.float32
    return LeafWindows(
        rows=rows,
        gram=jnp.zeros((len(rows), window_size, window_size), dtype),
        stamps=jnp.full((window_size,), -1, jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
        layout=Layout(params),
    )


def layout_of(windows: Windows) -> Layout:
    """The parameters of the windows."""
    layout: Layout = windows.layout if isinstance(windows, LeafWindows) else windows.rows.layout
    return layout


def push(windows: Windows, gradient: PyTree) -> tuple[Windows, PushInfo]:
    """Adds a gradient, which replaces the oldest one if the windows are full.

    Args:
        windows: the windows.
        gradient: a tree like the parameters.

    Returns:
        The new windows, and what they did with the gradient.
    """
    if not isinstance(windows, LeafWindows):
        return window.push(windows, gradient)
    slot = jnp.argmin(windows.stamps).astype(jnp.int32)
    leaves = [jnp.asarray(leaf) for leaf in windows.layout.check(gradient, "gradient")]
    accepted = is_storable(leaves, windows.gram.dtype, len(windows.stamps))
    put = [
        part.put(slot, jnp.where(accepted, leaf, jnp.full_like(leaf, jnp.nan)))
        for part, leaf in zip(windows.rows, leaves, strict=True)
    ]
    gram, nowhere = windows.gram, len(windows.stamps)
    # Storage of few bits may reject a leaf of a finite gradient.
    rows = tuple(
        part.clear(jnp.where(stored | ~accepted, nowhere, slot)) for part, _, stored in put
    )
    if put:
        each = [jnp.where(stored, dots, jnp.zeros_like(dots)) for _, dots, stored in put]
        dots = jnp.stack([row.astype(gram.dtype) for row in each])
        gram = jnp.where(accepted, gram.at[:, slot, :].set(dots).at[:, :, slot].set(dots), gram)
    stamps = windows.stamps.at[slot].set(jnp.max(windows.stamps) + 1)
    new = windows._replace(
        rows=rows,
        gram=gram,
        stamps=jnp.where(accepted, stamps, windows.stamps),
        rejected=windows.rejected + (1 - accepted.astype(jnp.int32)),
    )
    return new, PushInfo(slot, accepted)


def is_storable(leaves: list[Any], dtype: jnp.dtype, num_rows: int) -> Bool[Array, ""]:
    """Whether a gradient is finite and small enough to be squared and summed over a window."""
    squares = [jnp.sum(jnp.square(jnp.asarray(leaf).astype(dtype))) for leaf in leaves]
    return is_small_enough(functools.reduce(jnp.add, squares, jnp.zeros((), dtype)), num_rows)


def combine(windows: Windows, solve: Callable[[Float[Array, "m m"]], Float[Array, " m"]]) -> PyTree:
    """``G^T c`` with ``c = solve(G G^T)``, in each window; a tree like the parameters."""
    if not isinstance(windows, LeafWindows):
        return windows.rows.combine(solve(windows.gram))
    if not windows.rows:
        return jax.tree.unflatten(windows.layout.treedef, [])
    pairs = zip(windows.rows, jax.vmap(solve)(windows.gram), strict=True)
    leaves = [part.combine(c.astype(part.dtype)) for part, c in pairs]
    return jax.tree.unflatten(windows.layout.treedef, leaves)
