"""Sums of products of gradients in blocks, whose memory does not grow with their number.

The Fisher of a block, ``lambda I + G_b^T G_b / n``, depends on the n gradients only through the
B x B matrix ``S_b = sum_i g_b g_b^T``. The sums of all blocks take d B numbers, whatever n is.

One gradient would read and write all d B numbers. So gradients wait in a buffer of at most B / 2
rows, and one batched product adds a full buffer. After the last gradient a square root of each sum
takes its place: ``R_b`` (B x B) with ``R_b^T R_b = (B / n) S_b``. The rows of ``R_b`` have the
Fisher of the n gradients, so functions of blocks take them for B gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from mfac_jax import _checks, algebra
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import (
    ColumnRows,
    WritableRows,
    check_columns,
    check_traceable,
    check_writable,
    is_small_enough,
    leaves_of,
)
from mfac_jax.rows._map import after, concatenated, in_pieces
from mfac_jax.rows._partition import (
    PIECE_ENTRIES,
    BlockRun,
    Blocks,
    Partition,
    check_partition,
    flat_vector,
    partition,
)
from mfac_jax.rows._storage import Dense, Storage, check_storage


# Compared by identity: the order of a partition is an array, which is not simply equal.
@dataclass(frozen=True, eq=False)
class InBlocks(Storage):
    """Keeps no gradients, only the sums of their products in blocks: :class:`BlockSums`.

    Attributes:
        blocks: the blocks, as in :func:`mfac_jax.fisher_inverse` or as a partition, for example
            from :func:`mfac_jax.pruning.step_blocks`.
        storage: how gradients are stored until they are added.

    Raises:
        TypeError: ``storage`` is not a storage.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import fisher_inverse, rows
        >>> gradients = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> sums = rows.as_rows(gradients, storage=rows.InBlocks([2, 1]))
        >>> fisher_inverse(sums, damping=0.5, blocks=[2, 1]).diagonal()
        Array([1. , 0.4, 2. ], dtype=float32)
    """

    blocks: Blocks | Partition
    storage: Storage = Dense()  # noqa: RUF009  (immutable)

    def __post_init__(self) -> None:
        check_storage(self.storage)

    def empty(self, params: PyTree, num_rows: int) -> BlockSums:
        """Sums for ``num_rows`` gradients of ``params``.

        Args:
            params: the parameters, or anything with their shapes and dtypes.
            num_rows: ``n``, the number of gradients to come.

        Raises:
            TypeError: the rows of :attr:`storage` cannot be written and read by columns under
                ``jit``, or an argument has the wrong type.
            ValueError: ``num_rows`` is below 1, the blocks do not fit, or there are none.
        """
        n, layout = _checks.positive_int(num_rows, "num_rows"), Layout(params)
        given = self.blocks
        cut = given if isinstance(given, Partition) else partition(layout, given)
        check_partition(cut, layout)
        if not cut.num_blocks:
            raise ValueError("sums in blocks need at least one block, got none.")
        # Half of the memory of the sums.
        most = sum(run.width * run.size for run in cut.runs) // (2 * layout.size)
        buffer = self.storage.empty(params, min(n, max(most, 1)))
        what = f"InBlocks with storage={self.storage!r}"
        check_writable(buffer, what)
        check_columns(buffer, what)
        check_traceable(buffer, what)
        dtype = buffer.dtype
        blocks = tuple(jnp.zeros((run.count, run.size, run.size), dtype) for run in cut.runs)
        total = layout.unflatten(jnp.zeros(layout.size, dtype))
        held = jnp.zeros(buffer.num_rows, bool)
        return BlockSums(blocks, total, cut, layout, n, 0, buffer, held)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockSums(WritableRows, ColumnRows):
    """``sum_i g_b g_b^T`` of every block of one partition, and the sum of all gradients.

    Gradients are written in order, each once, outside of ``jit``. After the last one,
    :meth:`map_blocks` serves the blocks of :attr:`partition` and no others: everything that
    :func:`mfac_jax.fisher_inverse` and pruning compute in blocks. There are no products with
    single gradients. Sums of full rank are as accurate as those that dense rows compute.
    :func:`mfac_jax.algebra.square_root` says what rounding adds to sums of lower rank; it matters
    for dampings below 1e-3 of the mean of the diagonal.

    Attributes:
        blocks: the sums of each run of blocks, (b, B, B); square roots after the last gradient.
        total: the sum of the gradients, a tree like the parameters.
        partition: the blocks.
        layout: the parameters that the gradients belong to.
        num_rows: ``n``, the number of gradients (static).
        num_written: the number of gradients so far (static).
        buffer: rows for the gradients that are not added yet; None after the last gradient.
        held: which rows of the buffer hold such a gradient.
    """

    blocks: tuple[Float[Array, "_ _ _"], ...]
    total: PyTree
    partition: Partition
    layout: Any  # a Layout
    num_rows: int = field(metadata={"static": True})
    num_written: int = field(metadata={"static": True})
    buffer: Any = None
    held: Any = None

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the sums, which is the accumulation dtype of the buffer."""
        return self.blocks[0].dtype

    @property
    def has_products(self) -> bool:
        """False."""
        return False

    @property
    def mean(self) -> PyTree:
        """The mean of the gradients, a tree like the parameters.

        Raises:
            ValueError: a gradient is still to come.
        """
        self._check_complete()
        return _scaled(self.total, jnp.asarray(1 / self.num_rows, self.dtype))

    def write_rows(
        self, first: int | Int[Array, ""], gradients: PyTree, count: int | Int[Array, ""]
    ) -> tuple[BlockSums, Bool[Array, " k"]]:
        """Adds the first ``count`` of k stacked gradients; the sums are donated.

        Args:
            first: the number of gradients so far.
            gradients: a tree like the parameters with leaves ``(k, *shape)``.
            count: the number of gradients to add; at most k.

        Returns:
            The new sums, and which gradients were accepted; others add nothing.

        Raises:
            TypeError: ``first`` or ``count`` is traced.
            ValueError: a gradient comes out of order or twice.
        """
        if isinstance(first, jax.core.Tracer) or isinstance(count, jax.core.Tracer):
            raise TypeError("sums in blocks are written outside of jit, got traced rows.")
        start, end = int(first), int(first) + int(count)
        if start != self.num_written or end > self.num_rows:
            raise ValueError(
                f"gradients must be added in order, each once: expected row {self.num_written} of "
                f"{self.num_rows}, got rows {start} to {end - 1}."
            )
        small = _are_small(gradients, dtype=self.dtype, num_rows=self.num_rows)
        accepted = jnp.ones_like(small)
        rows = self
        while rows.num_written < end:
            done = rows.num_written - start
            rows, accepted = rows._buffered(gradients, small, accepted, done, end - start - done)
        return rows, accepted

    def _buffered(
        self,
        gradients: PyTree,
        small: Bool[Array, " k"],
        accepted: Bool[Array, " k"],
        done: int,
        left: int,
    ) -> tuple[BlockSums, Bool[Array, " k"]]:
        """Writes as many gradients as fit into the buffer; adds the buffer if it is then full."""
        length = self.buffer.num_rows
        slot = self.num_written % length
        count = min(length - slot, left)
        if done or len(small) > length:
            gradients = _taken(gradients, done, length=min(len(small), length))
        buffer, stored = self.buffer.write_rows(slot, gradients, count)
        held, accepted = _noted(self.held, accepted, stored, small, slot, done, count)
        rows = replace(self, buffer=buffer, held=held, num_written=self.num_written + count)
        is_last = rows.num_written == self.num_rows
        if slot + count == length or is_last:
            sums = _added(self.blocks, self.total, held, buffer, self.partition)
            blocks, total, held = sums
            rows = replace(rows, blocks=blocks, total=total, held=held)
        if is_last:
            roots = _square_roots(rows.blocks, self.partition, num_rows=self.num_rows)
            rows = replace(rows, blocks=roots, buffer=None, held=None)
        return rows, accepted

    def write(self, row: Int[Array, ""], gradient: PyTree) -> tuple[BlockSums, Bool[Array, ""]]:
        stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], gradient)
        rows, accepted = self.write_rows(row, stacked, 1)
        return rows, accepted[0]

    def map_blocks(
        self,
        partition: Partition,
        function: Callable[..., Any],
        *vectors: PyTree,
        constants: PyTree = (),
        by_run: bool = False,
    ) -> Any:
        """:meth:`ColumnRows.map_blocks` for the blocks of :attr:`partition`.

        The batches hold B rows, whose mean outer product is that of the n gradients.

        Args:
            partition: blocks equal to those of :attr:`partition`. If ``jit`` traces their orders
                and they differ, the results are NaN.
            function: as in :meth:`ColumnRows.map_blocks`.
            vectors: trees like the parameters, of numbers or booleans.
            constants: arrays that every call receives whole.
            by_run: as in :meth:`ColumnRows.map_blocks`.

        Raises:
            TypeError: ``partition`` has another type.
            ValueError: a gradient is still to come, or the blocks are others.
        """
        self._check_complete()
        check_partition(partition, self.layout, by_run=by_run)
        same = self._match(partition)
        leaves = tuple(leaves_of(self.layout, vector) for vector in vectors)
        held = self.blocks, self.partition, self.layout
        return _map_roots(*held, same, function, leaves, tuple(constants), by_run=by_run)

    def _match(self, other: Partition) -> Bool[Array, ""] | None:
        """Checks that the other partition has the same blocks.

        Returns:
            Whether it has, if that depends on traced orders; otherwise None.
        """
        own = self.partition
        same: bool | Array = own.runs == other.runs
        if same and own.order is not other.order:
            end = own.runs[-1].start + own.runs[-1].width
            orders = [
                jnp.arange(end, dtype=jnp.int32) if order is None else order[:end]
                for order in (own.order, other.order)
            ]
            same = jnp.all(orders[0] == orders[1])
        if isinstance(same, jax.core.Tracer):
            return same
        if not same:
            raise ValueError(
                "sums in blocks serve the blocks that they were made for: expected "
                f"{_described(own)}, got {_described(other)}."
            )
        return None

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        del lower
        if matrix is not None:
            self._refuse("products with a matrix")
        means = self.map_blocks(self.partition, _mean_squares)
        return _scaled(means, jnp.asarray(self.num_rows, self.dtype))

    def both_column_square_sums(
        self, matrix: Float[Array, "k m"], *, lower: bool = False
    ) -> tuple[PyTree, PyTree]:
        del matrix, lower
        self._refuse("products with a matrix")

    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        del vector
        self._refuse("dots")

    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        del coefficients, vector, scale
        self._refuse("combine")

    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        del mask
        self._refuse("gram")

    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        del coordinates
        self._refuse("take")

    def put(
        self, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[BlockSums, Float[Array, " m"], Bool[Array, ""]]:
        del row, gradient
        self._refuse("put")

    def clear(self, row: Int[Array, ""]) -> BlockSums:
        del row
        self._refuse("clear")

    def restrict(self, mask: PyTree) -> BlockSums:
        del mask
        self._refuse("restrict")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"BlockSums keeps sums in blocks and no gradients, so it has no {what}: expected an "
            "operation in its blocks. Store the gradients, for example in Dense(), for all others."
        )

    def _check_complete(self) -> None:
        if self.num_written < self.num_rows:
            raise ValueError(
                "sums in blocks are read after the last gradient: expected "
                f"{self.num_rows} gradients, got {self.num_written}."
            )


def _described(partition: Partition) -> str:
    sizes = ", ".join(f"{run.count} of {run.size}" for run in partition.runs)
    order = "in order" if partition.order is None else "in an order of their own"
    return f"blocks {sizes} coordinates, {order}"


def _mean_squares(batch: Float[Array, "b n B"]) -> Float[Array, "b B"]:
    return jnp.sum(batch * batch, axis=1) / batch.shape[1]


@jax.jit
def _scaled(tree: PyTree, factor: Float[Array, ""]) -> PyTree:
    return jax.tree.map(lambda leaf: factor * leaf, tree)


@functools.partial(jax.jit, static_argnames=("dtype", "num_rows"))
def _are_small(gradients: PyTree, *, dtype: jnp.dtype, num_rows: int) -> Bool[Array, " k"]:
    """Whether each gradient and the sums of n such gradients are finite."""
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(gradients)]
    squares = [jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    total = functools.reduce(jnp.add, squares)
    return jax.vmap(lambda square: is_small_enough(square, num_rows))(total)


@functools.partial(jax.jit, static_argnames="length")
def _taken(gradients: PyTree, first: Int[Array, ""] | int, *, length: int) -> PyTree:
    """``length`` of the stacked gradients from ``first`` on; the last is repeated at the end."""
    places = first + jnp.arange(length, dtype=jnp.int32)
    return jax.tree.map(lambda leaf: leaf[jnp.minimum(places, len(leaf) - 1)], gradients)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _noted(
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
def _added(
    blocks: tuple[Float[Array, "_ _ _"], ...],
    total: PyTree,
    held: Bool[Array, " r"],
    buffer: Any,
    partition: Partition,
) -> tuple[tuple[Float[Array, "_ _ _"], ...], PyTree, Bool[Array, " r"]]:
    """Adds the gradients in the buffer to the sums; the buffer then holds none."""
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
def _square_roots(
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
def _map_roots(
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
