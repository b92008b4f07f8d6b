"""Applying a function to all blocks of coordinates, some at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from mfac_jax._layout import PyTree
from mfac_jax.inverse._partition import BlockRun
from mfac_jax.rows import GradientRows, PermutedRows

# Blocks are worked on in pieces of so many entries of the gradients at a time: 8 MiB in float32
# at the least and 256 MiB at the most. Blocks with B <= n go in four to six pieces, if that lies
# in between: with all that is made of it, a batch of gradients and four or five of matrices, a
# piece then takes less memory than the gradients. More pieces take longer.
_FEWEST_ENTRIES, _MOST_ENTRIES = 2**21, 2**26

# So many pieces are written out one after another, more are a loop: a loop takes its columns
# from where a traced number says, which copies them one by one in some views of rows.
_MOST_PIECES = 8

# Blocks of several sizes are padded to one size, since every size is compiled by itself, for up
# to a second. Padding may add this fraction of the work, with B^3 for a block of B, an upper bound.
# It may always add _FREE_WORK multiplications, which take some milliseconds.
_MOST_PADDING = 0.1
_FREE_WORK = 2**26


Result = TypeVar("Result", Array, tuple[Array, Array])


def map_blocks(
    rows: GradientRows,
    runs: tuple[BlockRun, ...],
    function: Callable[..., Result],
    *vectors: Shaped[Array, " d"],
) -> Result:
    """Applies ``function`` to all blocks, some at a time, and puts the results in a row.

    Args:
        rows: ``G``.
        runs: the blocks.
        function: takes the gradients of b blocks of one size, (b, n, B), and those parts
            of each of ``vectors``, (b, B). It returns a number for each coordinate, (b, B), or
            for each block, (b, 1), or a pair of such results. Blocks may be padded by
            coordinates whose gradients and parts of the vectors are 0 (or false). Batches may
            be padded by blocks of such coordinates.
        vectors: flat vectors (d,) that are cut as the gradients are.

    Returns:
        The results, flattened, in the order of the blocks.
    """
    if not runs:
        empty = [jax.ShapeDtypeStruct((1, 1), v.dtype) for v in vectors]
        batch = jax.ShapeDtypeStruct((1, rows.num_rows, 1), rows.dtype)
        like = jax.eval_shape(function, batch, *empty)
        return jax.tree.map(lambda x: jnp.zeros(0, x.dtype), like)
    if isinstance(rows, PermutedRows):
        results = _map_scattered(rows, runs, function, vectors)
    else:
        results = _map_neighbours(rows, runs, function, vectors)
    return jax.tree.map(lambda *parts: jnp.concatenate([p.reshape(-1) for p in parts]), *results)


def _piece_size(num_rows: int, run: BlockRun) -> int:
    """How many blocks are worked on at a time."""
    fewest, most = (
        max(entries // (num_rows * run.size), 1) for entries in (_FEWEST_ENTRIES, _MOST_ENTRIES)
    )
    pieces = 4 if 2 * run.size <= num_rows else 6
    part = -(-run.count // pieces) if run.size <= num_rows else 0
    return min(max(part, fewest), most, run.count)


def _map_neighbours(
    rows: GradientRows,
    runs: tuple[BlockRun, ...],
    function: Callable[..., Result],
    vectors: tuple[Shaped[Array, " d"], ...],
) -> list[Result]:
    """Blocks whose columns are neighbours in memory, run by run."""
    n = rows.num_rows
    results: list[Result] = []

    def piece(start: int | Int[Array, ""], count: int, size: int) -> Result:
        width = count * size
        batch = jnp.moveaxis(rows.columns(start, width).reshape(n, count, size), 1, 0)
        parts = [lax.dynamic_slice_in_dim(v, start, width).reshape(count, size) for v in vectors]
        return function(after(batch, results[-1:]), *parts)

    for run in runs:
        count = _piece_size(n, run)
        pieces, rest = divmod(run.count, count)
        if pieces <= _MOST_PIECES:
            for first in range(0, run.count, count):
                here = min(count, run.count - first)
                results.append(piece(run.start + first * run.size, here, run.size))
            continue
        # A loop, so that only one piece is in memory at a time.
        starts = run.start + count * run.size * jnp.arange(pieces)
        results.append(lax.map(functools.partial(piece, count=count, size=run.size), starts))
        if rest:
            results.append(piece(run.start + pieces * count * run.size, rest, run.size))
    return results


def _map_scattered(
    rows: PermutedRows,
    runs: tuple[BlockRun, ...],
    function: Callable[..., Result],
    vectors: tuple[Shaped[Array, " d"], ...],
) -> list[Result]:
    """Blocks whose columns are taken one by one: padded to few sizes, each a single loop."""
    n, d = rows.num_rows, rows.layout.size
    results: dict[int, Result] = {}

    def piece(place: Int[Array, "2 b"], size: int, before: Any) -> Result:
        within = jnp.arange(size, dtype=jnp.int32)[None]
        there = within < place[1][:, None]
        index = jnp.minimum(place[0][:, None] + within, d - 1)
        batch = rows.take(index.reshape(-1)).reshape(n, *index.shape)
        batch = jnp.moveaxis(jnp.where(there, batch, jnp.zeros_like(batch)), 1, 0)
        parts = [jnp.where(there, v[index], jnp.zeros((), v.dtype)) for v in vectors]
        return function(after(batch, before), *parts)

    found: Any = None
    for members in _of_like_size(runs):
        size = runs[members[0]].size
        here = [runs[i] for i in members]
        total = sum(run.count for run in here)
        pieces = -(-total // _piece_size(n, BlockRun(0, total, size)))
        # First coordinate and size of every block; the last ones of the last piece hold nothing.
        starts = np.concatenate([run.start + run.size * np.arange(run.count) for run in here])
        sizes = np.concatenate([np.full(run.count, run.size) for run in here])
        table = np.stack([starts, sizes]).astype(np.int32)
        table = np.pad(table, ((0, 0), (0, -total % pieces)))
        places = jnp.moveaxis(jnp.asarray(table).reshape(2, pieces, -1), 1, 0)
        of_piece = functools.partial(piece, size=size, before=found)
        found = lax.map(of_piece, places) if pieces > 1 else of_piece(places[0])
        first = 0
        for i in members:
            results[i] = _cut(found, first, runs[i])
            first += runs[i].count
    return [results[i] for i in range(len(runs))]


def _cut(results: Result, first: int, run: BlockRun) -> Result:
    """Those of a run, which begins at block ``first``, without the padding."""

    def cut(x: Array) -> Array:
        blocks = x.reshape(-1, x.shape[-1])
        return blocks[first : first + run.count, : run.size]

    return jax.tree.map(cut, results)


def _of_like_size(runs: tuple[BlockRun, ...]) -> list[list[int]]:
    """Which runs are padded to one size, that of the first of them."""

    def work(i: int, size: int) -> int:
        return runs[i].count * size**3

    free = max(_MOST_PADDING * sum(work(i, run.size) for i, run in enumerate(runs)), _FREE_WORK)
    groups: list[list[int]] = []
    for i in sorted(range(len(runs)), key=lambda i: -runs[i].size):
        padded = work(i, runs[groups[-1][0]].size) - work(i, runs[i].size) if groups else 0
        if groups and padded <= free:
            free -= padded
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def after(batch: Float[Array, "b n B"], results: PyTree) -> Float[Array, "b n B"]:
    """``batch``, but not before ``results`` are there.

    Batched factorizations that do not depend on one another run at the same time, and XLA
    for the CPU in jax 0.10 then lets them wait for one another forever.
    """
    for result in jax.tree.leaves(results):
        word = lax.bitcast_convert_type(result.reshape(-1)[:1], jnp.uint8)
        never = jnp.any(lax.population_count(word) > 8)
        batch = jnp.where(never, jnp.zeros_like(batch), batch)
    return batch
