"""The compiled programs of sums in blocks: adding gradients, square roots, and maps of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax import algebra
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import is_small_enough
from mfac_jax.rows._map import after, concatenated, in_pieces
from mfac_jax.rows._partition import PIECE_ENTRIES, BlockRun, Partition, flat_vector


@jax.jit
def scaled(tree: PyTree, factor: Float[Array, ""]) -> PyTree:
    """The tree times a factor."""
    return jax.tree.map(lambda leaf: factor * leaf, tree)


@functools.partial(jax.jit, static_argnames=("dtype", "num_rows"))
def are_small(gradients: PyTree, *, dtype: jnp.dtype, num_rows: int) -> Bool[Array, " k"]:
    """Whether each gradient and the sums of n such gradients are finite."""
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(gradients)]
    squares = [jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    total = functools.reduce(jnp.add, squares)
    return jax.vmap(lambda square: is_small_enough(square, num_rows))(total)


@functools.partial(jax.jit, static_argnames="length")
def taken(gradients: PyTree, first: Int[Array, ""] | int, *, length: int) -> PyTree:
    """``length`` of the stacked gradients from ``first`` on; the last is repeated at the end."""
    places = first + jnp.arange(length, dtype=jnp.int32)
    return jax.tree.map(lambda leaf: leaf[jnp.minimum(places, len(leaf) - 1)], gradients)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def noted(
    held: Bool[Array, " r"],
    accepted: Bool[Array, " k"],
    stored: Bool[Array, " l"],
    small: Bool[Array, " k"],
    slot: Int[Array, ""] | int,
    done: Int[Array, ""] | int,
    count: Int[Array, ""] | int,
) -> tuple[Bool[Array, " r"], Bool[Array, " k"]]:
    """Notes which rows of the buffer hold a gradient, and which gradients were accepted."""
    own = jnp.arange(len(stored), dtype=jnp.int32)
    good = stored & small[jnp.minimum(done + own, len(small) - 1)]
    rows = jnp.where(own < count, slot + own, len(held))
    places = jnp.where(own < count, done + own, len(accepted))
    return held.at[rows].set(good, mode="drop"), accepted.at[places].set(good, mode="drop")


def _in_place(
    blocks: Float[Array, "b B B"],
    count: int,
    function: Callable[[int | Int[Array, ""], Float[Array, "_ B B"]], Float[Array, "_ B B"]],
) -> Float[Array, "b B B"]:
    """Replaces ``count`` blocks after another by ``function(first, blocks)``, in place."""

    def replaced(first: int | Int[Array, ""], count: int, blocks: Array) -> Array:
        piece = function(first, lax.dynamic_slice_in_dim(blocks, first, count))
        return lax.dynamic_update_slice_in_dim(blocks, piece, first, axis=0)

    whole, rest = divmod(len(blocks), count)
    if whole == 1:
        blocks = replaced(0, count, blocks)
    else:
        blocks = lax.fori_loop(0, whole, lambda i, own: replaced(i * count, count, own), blocks)
    return replaced(whole * count, rest, blocks) if rest else blocks


def _piece_size(run: BlockRun, height: int) -> int:
    """The number of blocks in a piece of about :data:`PIECE_ENTRIES`."""
    return max(min(PIECE_ENTRIES // (height * run.size), run.count), 1)


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def added(
    blocks: tuple[Float[Array, "_ _ _"], ...],
    total: PyTree,
    held: Bool[Array, " r"],
    buffer: Any,
    partition: Partition,
) -> tuple[tuple[Float[Array, "_ _ _"], ...], PyTree, Bool[Array, " r"]]:
    """Adds the gradients in the buffer to the sums, in place; the buffer then holds none."""
    combined = buffer.combine(held.astype(buffer.dtype))
    total = jax.tree.map(jnp.add, total, combined)

    def batch(run: BlockRun, first: int | Int[Array, ""], count: int) -> Float[Array, "r b B"]:
        start, width = run.start + first * run.size, count * run.size
        if partition.order is None:
            columns = buffer.columns(start, width)
        else:
            columns = buffer.take(lax.dynamic_slice_in_dim(partition.order, start, width))
        kept = jnp.where(held[:, None], columns, jnp.zeros_like(columns))
        return kept.reshape(len(held), count, run.size)

    def added(
        first: int | Int[Array, ""], sums: Float[Array, "b B B"], run: BlockRun
    ) -> Float[Array, "b B B"]:
        gradients = batch(run, first, len(sums))
        return sums + jnp.einsum("rbi,rbj->bij", gradients, gradients, precision="highest")

    new = []
    for run, own in zip(partition.runs, blocks, strict=True):
        count = _piece_size(run, max(len(held), run.size))
        new.append(_in_place(own, count, functools.partial(added, run=run)))
    return tuple(new), total, jnp.zeros_like(held)


@functools.partial(jax.jit, static_argnames="num_rows", donate_argnums=0)
def square_roots(
    blocks: tuple[Float[Array, "_ _ _"], ...], partition: Partition, *, num_rows: int
) -> tuple[Float[Array, "_ _ _"], ...]:
    """``R_b`` with ``R_b^T R_b = (B / n) S_b``."""
    roots: list[Array] = []
    for run, own in zip(partition.runs, blocks, strict=True):
        before = roots[-1] if roots else None

        def root(
            first: int | Int[Array, ""],
            sums: Float[Array, "b B B"],
            before: Array | None = before,
            size: int = run.size,
        ) -> Float[Array, "b B B"]:
            del first
            scale = jnp.sqrt(jnp.asarray(size / num_rows, sums.dtype))
            return scale * algebra.square_root(after(sums, before))

        roots.append(_in_place(own, _piece_size(run, run.size), root))
    return tuple(roots)


@functools.partial(jax.jit, static_argnames=("function", "by_run"))
def map_roots(
    blocks: tuple[Float[Array, "_ _ _"], ...],
    partition: Partition,
    layout: Layout,
    same: Bool[Array, ""] | None,
    function: Callable[..., Any],
    vectors: tuple[tuple[Array, ...], ...],
    constants: tuple[Any, ...],
    *,
    by_run: bool,
) -> Any:
    """:meth:`BlockSums.map_blocks`; the results are NaN if ``same`` is false."""
    order = partition.order
    flat = [flat_vector(leaves, blocks[0].dtype) for leaves in vectors]
    flat = flat if order is None else [vector[order] for vector in flat]

    def piece(
        first: int | Int[Array, ""], count: int, before: Any, run: BlockRun, roots: Array
    ) -> Any:
        batch = lax.dynamic_slice_in_dim(roots, first, count)
        if same is not None:
            batch = jnp.where(same, batch, jnp.full_like(batch, jnp.nan))
        start, width = run.start + first * run.size, count * run.size
        parts: list[Shaped[Array, "b B"]] = [
            lax.dynamic_slice_in_dim(v, start, width).reshape(count, run.size) for v in flat
        ]
        return function(after(batch, before), *parts, *constants)

    results: list[list[Any]] = []
    for run, roots in zip(partition.runs, blocks, strict=True):
        before = results[-1][-1] if results else None
        of_piece = functools.partial(piece, run=run, roots=roots)
        results.append(in_pieces(of_piece, run, run.size, before))
    if by_run:
        return tuple(jax.tree.map(concatenated, *pieces) for pieces in results)
    pieces = [result for of_run in results for result in of_run]
    return jax.tree.map(lambda *parts: partition.join(parts, layout), *pieces)
