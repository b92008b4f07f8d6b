"""The windows of an optimizer: one for all parameters, or one for each block of them.

A window for each block makes the Fisher block-diagonal. The Gram matrices of all blocks are one
batch (b, m, m), so their algebra is one program. A gradient that is not finite is stored in no
window. If the storage of a parameter rejects a gradient that is finite, this parameter has a zero
row in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import window
from mfac_jax._layout import Layout, PyTree
from mfac_jax.optimizer._direction import Direction, lengths, solve, system
from mfac_jax.rows import BlockRows, Storage, is_small_enough
from mfac_jax.rows._base import check_traceable, check_writable
from mfac_jax.rows._blocks import WholeRows
from mfac_jax.rows._room import require_room_of
from mfac_jax.window import PushInfo, Window

BLOCKS = ("leaf", "output", "output_first")

# The matrices like the Gram matrix that a step computes with.
_SQUARES = 4


class BlockWindows(NamedTuple):
    """The most recent gradients, with a Gram matrix for each block of parameters; immutable.

    Attributes:
        rows: the rows of each parameter, in the order of ``jax.tree.leaves``.
        gram: ``G G^T`` for each block, those of the first parameter first; (b, m, m), zero in
            empty slots.
        stamps: as in :class:`mfac_jax.window.Window`; (m,) int32.
        rejected: the number of gradients that were rejected; scalar int32.
        layout: the parameters.
    """

    rows: tuple[BlockRows, ...]
    gram: Float[Array, "b m m"]
    stamps: Int[Array, " m"]
    rejected: Int[Array, ""]
    layout: Any


Windows = Window | BlockWindows


def init(params: PyTree, window_size: int, storage: Storage, blocks: str | None) -> Windows:
    """Empty windows for gradients of ``params``.

    Args:
        params: the parameters.
        window_size: ``m``.
        storage: how gradients are stored.
        blocks: None for one window of all parameters, or one of :data:`BLOCKS`.
    """
    if not storage.is_traceable:  # before it makes files
        raise TypeError(
            f"a window under jit needs rows that jit can trace, got storage={storage!r}."
        )
    if blocks is None:
        held = window.init(params, window_size, storage=storage)
        check_traceable(held.rows, "a window under jit")
        return held

    make = functools.partial(_empty_blocks, storage=storage, blocks=blocks)
    require_room_of(make, params, window_size, "window_size")
    return make(params, window_size)


def _empty_blocks(params: PyTree, window_size: int, storage: Storage, blocks: str) -> BlockWindows:
    def rows_of(leaf: Any) -> BlockRows:
        if blocks != "leaf" and jnp.ndim(leaf) > 1:
            return storage.by_output(leaf, window_size, -1 if blocks == "output" else 0)
        rows = check_writable(storage.empty(leaf, window_size), "a window")
        check_traceable(rows, "a window under jit")
        return WholeRows(rows)

    rows = tuple(map(rows_of, jax.tree.leaves(params)))
    count = sum(part.num_blocks for part in rows)
    dtype = jnp.result_type(*[part.dtype for part in rows]) if rows else jnp.float32
    return BlockWindows(
        rows=rows,
        gram=jnp.zeros((count, window_size, window_size), dtype),
        stamps=jnp.full((window_size,), -1, jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
        layout=Layout(params),
    )


def step_bytes(windows: Windows, platform: str) -> int:
    """An estimate of the temporary arrays of a step; see :meth:`GradientRows.step_bytes`."""
    rows = windows.rows if isinstance(windows, BlockWindows) else (windows.rows,)
    squares = _SQUARES * windows.gram.size * windows.gram.dtype.itemsize
    return squares + sum(part.step_bytes(platform) for part in rows)


def layout_of(windows: Windows) -> Layout:
    """The parameters of the windows."""
    layout: Layout = windows.layout if isinstance(windows, BlockWindows) else windows.rows.layout
    return layout


def push(windows: Windows, gradient: PyTree) -> tuple[Windows, PushInfo]:
    """Adds a gradient, which replaces the oldest one if the windows are full.

    Args:
        windows: the windows.
        gradient: a tree like the parameters.

    Returns:
        The new windows, and what they did with the gradient.
    """
    if not isinstance(windows, BlockWindows):
        return window.push(windows, gradient)
    slot = jnp.argmin(windows.stamps).astype(jnp.int32)
    leaves = [jnp.asarray(leaf) for leaf in windows.layout.check(gradient, "gradient")]
    accepted = is_storable(leaves, windows.gram.dtype, len(windows.stamps))
    pairs = [
        part.put(slot, leaf, accepted) for part, leaf in zip(windows.rows, leaves, strict=True)
    ]
    gram = windows.gram
    if pairs:
        dots = jnp.concatenate([each.astype(gram.dtype) for _, each in pairs])
        gram = jnp.where(accepted, gram.at[:, slot, :].set(dots).at[:, :, slot].set(dots), gram)
    stamps = windows.stamps.at[slot].set(jnp.max(windows.stamps) + 1)
    new = windows._replace(
        rows=tuple(part for part, _ in pairs),
        gram=gram,
        stamps=jnp.where(accepted, stamps, windows.stamps),
        rejected=windows.rejected + (1 - accepted.astype(jnp.int32)),
    )
    return new, PushInfo(slot, accepted)


def is_storable(leaves: list[Any], dtype: jnp.dtype, num_rows: int) -> Bool[Array, ""]:
    """Whether a gradient is finite and small enough to be squared and summed over a window."""
    squares = [jnp.sum(jnp.square(jnp.asarray(leaf).astype(dtype))) for leaf in leaves]
    return is_small_enough(functools.reduce(jnp.add, squares, jnp.zeros((), dtype)), num_rows)


def step(
    windows: Windows,
    direction: Direction,
    values: Float[Array, " m"] | None,
    damping: Callable[[Float[Array, " p"]], Float[Array, " p"]],
    denominator: Float[Array, ""],
) -> PyTree:
    """The direction ``G^T c`` of each window; a tree like the parameters.

    Args:
        windows: the windows.
        direction: what the direction is.
        values: the values of the gradients held; None if no weights read them.
        damping: ``lambda`` as a function of the traces of the undamped Fisher. The blocks of one
            parameter have one damping, which follows from the mean of their traces.
        denominator: ``n``, the divisor of the sum of outer products.
    """
    grams = windows.gram if isinstance(windows, BlockWindows) else windows.gram[None]
    counts = [p.num_blocks for p in windows.rows] if isinstance(windows, BlockWindows) else [1]
    if not counts:
        return jax.tree.unflatten(layout_of(windows).treedef, [])
    part, ends = np.repeat(np.arange(len(counts)), counts), np.cumsum(counts)[:-1]

    def total(each: Float[Array, " b"]) -> Float[Array, " p"]:
        return jax.ops.segment_sum(each, part, len(counts), indices_are_sorted=True)

    systems = jax.vmap(lambda gram: system(direction, gram, windows.stamps, values))(grams)
    traces = total(systems.trace) / np.asarray(counts, grams.dtype) / denominator
    lam = damping(traces)
    solution = jax.vmap(lambda each, own: solve(direction, each, own, denominator))(
        systems, lam[part]
    )
    if isinstance(windows, BlockWindows):
        pairs = zip(windows.rows, jnp.split(solution.coefficients, ends), strict=True)
        parts = [rows.combine(c) for rows, c in pairs]
    else:
        parts = [windows.rows.combine(solution.coefficients[0])]
    if direction.is_scaled:
        squares = jnp.stack([optax.tree.norm(u, squared=True) for u in parts])
        fisher = lam * squares + total(solution.image)
        factors = lengths(direction, total(solution.plain), squares, fisher)
        parts = [
            jax.tree.map(lambda x, f=f: f.astype(x.dtype) * x, u)
            for f, u in zip(factors, parts, strict=True)
        ]
    if isinstance(windows, BlockWindows):
        return jax.tree.unflatten(windows.layout.treedef, parts)
    return parts[0]
