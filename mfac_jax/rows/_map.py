"""Applies a function to all blocks of columns, some blocks at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from mfac_jax._layout import PyTree
from mfac_jax.rows._partition import PIECE_ENTRIES, BlockRun, Partition, flat_vector

if TYPE_CHECKING:
    from mfac_jax.rows._base import ColumnRows

# A piece of blocks has 2**21 to 2**26 entries of the gradients, 8 to 256 MiB in float32. Between
# these bounds, blocks with B <= n make four to six pieces. A piece and its intermediate results (a
# batch of gradients and four or five batches of matrices) then take less memory than the gradients.
# More pieces take longer.
_MOST_ENTRIES = 2**26

# At most this many pieces are unrolled; more pieces run in a loop. In a loop the start of the
# columns is traced, and leaf packing has to copy the columns one by one.
_MOST_PIECES = 8

# Blocks of several sizes are padded to one size, because every size compiles separately, for up to
# a second. Padding may add this fraction of the work, which is at most B^3 for a block of B. It may
# always add _FREE_WORK multiplications, which take some milliseconds.
_MOST_PADDING = 0.1
_FREE_WORK = 2**26


def map_columns(
    rows: ColumnRows,
    partition: Partition,
    function: Callable[..., Any],
    vectors: tuple[tuple[Array, ...], ...],
    constants: tuple[Any, ...],
    *,
    by_run: bool,
) -> Any:
    """:meth:`ColumnRows.map_blocks`, traced for rows that ``jit`` can trace.

    Args:
        rows: ``G``.
        partition: the blocks.
        function: as in :meth:`ColumnRows.map_blocks`.
        vectors: the leaves of each vector.
        constants: as in :meth:`ColumnRows.map_blocks`.
        by_run: as in :meth:`ColumnRows.map_blocks`.
    """

    def call(batch: Float[Array, "b n B"], parts: list[Shaped[Array, "b B"]], before: Any) -> Any:
        if rows.is_traceable:
            return function(after(batch, before), *parts, *constants)
        # One piece in memory at a time.
        return jax.block_until_ready(_call(batch, parts, constants, function=function))

    flat = [flat_vector(leaves, rows.dtype) for leaves in vectors]
    if partition.order is None:
        results = _map_neighbours(rows, partition.runs, call, flat)
    else:
        results = _map_scattered(rows, partition.order, partition.runs, call, flat)
    if by_run:
        return tuple(jax.tree.map(concatenated, *pieces) for pieces in results)
    pieces = list(itertools.chain.from_iterable(results))
    if not pieces:
        empty = [jax.ShapeDtypeStruct((1, 1), v.dtype) for v in flat]
        batch = jax.ShapeDtypeStruct((1, rows.num_rows, 1), rows.dtype)
        like = jax.eval_shape(lambda *args: function(*args, *constants), batch, *empty)
        pieces = [jax.tree.map(lambda x: jnp.zeros((0,) * x.ndim, x.dtype), like)]
    return jax.tree.map(lambda *parts: partition.join(parts, rows.layout), *pieces)


@functools.partial(jax.jit, static_argnames="function")
def _call(
    batch: Float[Array, "b n B"],
    parts: list[Shaped[Array, "b B"]],
    constants: tuple[Any, ...],
    *,
    function: Callable[..., Any],
) -> Any:
    return function(batch, *parts, *constants)


def _each(function: Callable[[Any], Any], xs: Shaped[np.ndarray, "p ..."], *, traced: bool) -> Any:
    """The stacked results of ``function`` for every ``x``, in a loop that ``jit`` traces once."""
    if traced:
        return lax.map(function, jnp.asarray(xs))
    return jax.tree.map(lambda *x: jnp.stack(x), *(function(jnp.asarray(x)) for x in xs))


def concatenated(*parts: Shaped[Array, "_ ..."]) -> Shaped[Array, "b ..."]:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _piece_size(num_rows: int, run: BlockRun) -> int:
    """The number of blocks in a piece."""
    fewest, most = (
        max(entries // (num_rows * run.size), 1) for entries in (PIECE_ENTRIES, _MOST_ENTRIES)
    )
    pieces = 4 if 2 * run.size <= num_rows else 6
    part = -(-run.count // pieces) if run.size <= num_rows else 0
    return min(max(part, fewest), most, run.count)


def piece_entries(num_rows: int, partition: Partition, matrices: int = 5) -> int:
    """The numbers that a piece of blocks takes with its intermediate results, for plans.

    Args:
        num_rows: the number of rows.
        partition: the blocks.
        matrices: the number of matrices of the smaller side of each block that exist at once.
    """
    each = [
        _piece_size(num_rows, run) * (num_rows * run.size + matrices * min(num_rows, run.size) ** 2)
        for run in partition.runs
    ]
    return max(each, default=0)


def _map_neighbours(
    rows: ColumnRows,
    runs: tuple[BlockRun, ...],
    function: Callable[..., Any],
    vectors: Sequence[Shaped[Array, " d"]],
) -> list[list[Any]]:
    """Maps blocks whose columns are neighbours; the results of the pieces of each run."""
    n = rows.num_rows
    results: list[list[Any]] = []

    def piece(first: int | Int[Array, ""], count: int, before: Any, run: BlockRun) -> Any:
        start, width = run.start + first * run.size, count * run.size
        batch = jnp.moveaxis(rows.columns(start, width).reshape(n, count, run.size), 1, 0)
        parts = [
            lax.dynamic_slice_in_dim(v, start, width).reshape(count, run.size) for v in vectors
        ]
        return function(batch, parts, before)

    for run in runs:
        before = results[-1][-1] if results else None
        of_run = functools.partial(piece, run=run)
        results.append(in_pieces(of_run, run, n, before, traced=rows.is_traceable))
    return results


def in_pieces(
    function: Callable[..., Any], run: BlockRun, num_rows: int, before: Any, *, traced: bool = True
) -> list[Any]:
    """The results of the pieces of a run.

    Args:
        function: ``function(first, count=..., before=...)`` maps ``count`` blocks of the run, the
            first of which is ``first``, after the results ``before``.
        run: the blocks.
        num_rows: the number of rows in a batch.
        before: the results before this run; None for the first run.
        traced: whether ``jit`` traces the function.
    """
    count = _piece_size(num_rows, run)
    pieces, done = run.count // count, 0
    found: list[Any] = []
    if pieces > _MOST_PIECES:
        # A loop keeps only one piece in memory at a time.
        of_piece = functools.partial(function, count=count, before=before)
        stacked = _each(of_piece, count * np.arange(pieces), traced=traced)
        found.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked))
        done = pieces * count
    for first in range(done, run.count, count):
        before = found[-1] if found else before
        found.append(function(first, count=min(count, run.count - first), before=before))
    return found


def _map_scattered(
    rows: ColumnRows,
    order: Int[Array, " k"],
    runs: tuple[BlockRun, ...],
    function: Callable[..., Any],
    vectors: Sequence[Shaped[Array, " d"]],
) -> list[list[Any]]:
    """Maps blocks whose columns are taken one by one; one loop for each padded size.

    The result of each run is one piece, as :func:`_map_neighbours` returns it.
    """
    n, places = rows.num_rows, order.size
    results: dict[int, Any] = {}

    def piece(place: Int[Array, "2 b"], size: int, before: Any) -> Any:
        within = jnp.arange(size, dtype=jnp.int32)[None]
        there = within < place[1][:, None]
        index = order[jnp.minimum(place[0][:, None] + within, places - 1)]
        batch = rows.take(index.reshape(-1)).reshape(n, *index.shape)
        batch = jnp.moveaxis(jnp.where(there, batch, jnp.zeros_like(batch)), 1, 0)
        parts = [jnp.where(there, v[index], jnp.zeros((), v.dtype)) for v in vectors]
        return function(batch, parts, before)

    found: Any = None
    for members in _of_like_size(runs, n):
        size = runs[members[0]].size
        here = [runs[i] for i in members]
        total = sum(run.count for run in here)
        pieces = -(-total // _piece_size(n, BlockRun(0, total, size)))
        # The first place and the size of every block. The last piece is padded with blocks of
        # size 0.
        starts = np.concatenate([run.start + run.size * np.arange(run.count) for run in here])
        sizes = np.concatenate([np.full(run.count, run.size) for run in here])
        table = np.stack([starts, sizes]).astype(np.int32)
        table = np.pad(table, ((0, 0), (0, -total % pieces)))
        tables = np.moveaxis(table.reshape(2, pieces, -1), 1, 0)
        of_piece = functools.partial(piece, size=size, before=found)
        if pieces > 1:
            stacked = _each(of_piece, tables, traced=rows.is_traceable)
            found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)
        else:
            found = of_piece(jnp.asarray(tables[0]))
        first = 0
        for i in members:
            results[i] = _cut(found, first, runs[i])
            first += runs[i].count
    return [[results[i]] for i in range(len(runs))]


def _cut(results: Any, first: int, run: BlockRun) -> Any:
    """The results of a run whose first block is ``first``, without the padding."""

    def cut(x: Array) -> Array:
        blocks = x[first : first + run.count]
        return blocks if x.ndim == 1 else blocks[:, : run.size]

    return jax.tree.map(cut, results)


def _of_like_size(runs: tuple[BlockRun, ...], num_rows: int) -> list[list[int]]:
    """Groups the runs that are padded to one size, the size of the first run of a group.

    A block of at most n coordinates is never padded to more than n, because blocks on the two
    sides of n are computed differently.
    """

    def work(i: int, size: int) -> int:
        return runs[i].count * size**3

    free = max(_MOST_PADDING * sum(work(i, run.size) for i, run in enumerate(runs)), _FREE_WORK)
    groups: list[list[int]] = []
    for i in sorted(range(len(runs)), key=lambda i: -runs[i].size):
        largest = runs[groups[-1][0]].size if groups else runs[i].size
        padded = work(i, largest) - work(i, runs[i].size)
        fits = (runs[i].size <= num_rows) == (largest <= num_rows)
        if groups and fits and padded <= free:
            free -= padded
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def after(batch: Float[Array, "b n B"], results: PyTree) -> Float[Array, "b n B"]:
    """``batch``, available only once ``results`` exist.

    XLA for the CPU runs independent factorizations of batches at the same time. In jax 0.10
    they can then wait for one another forever.
    """
    for result in jax.tree.leaves(results):
        first = result.reshape(-1)[:1]
        first = first.astype(jnp.uint8) if first.dtype == jnp.bool_ else first
        word = lax.bitcast_convert_type(first, jnp.uint8)
        never = jnp.any(lax.population_count(word) > 8)
        batch = jnp.where(never, jnp.zeros_like(batch), batch)
    return batch
