"""Sums of products of gradients in blocks, whose memory does not grow with their number.

The Fisher of a block, ``lambda I + G_b^T G_b / n``, depends on the n gradients only through the
B x B matrix ``S_b = sum_i g_b g_b^T``. The sums of all blocks take d B numbers, whatever n is.

One gradient would read and write all d B numbers. So gradients wait in a buffer of at most B / 2
rows, and one batched product adds a full buffer. After the last gradient a square root of each sum
takes its place: ``R_b`` (B x B) with ``R_b^T R_b = (B / n) S_b``. The rows of ``R_b`` have the
Fisher of the n gradients, so functions of blocks take them for B gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.rows._base import (
    ColumnRows,
    WritableRows,
    check_columns,
    check_traceable,
    check_writable,
    leaves_of,
)
from mfac_jax.rows._partition import Blocks, Partition, check_partition, partition
from mfac_jax.rows._storage import Dense, Storage, check_storage, traced_bytes
from mfac_jax.rows._sum_programs import (
    added,
    are_small,
    map_roots,
    noted,
    scaled,
    square_roots,
    taken,
)


# Compared by identity: the order of a partition is an array, which is not simply equal.
@dataclass(frozen=True, eq=False)
class InBlocks(Storage):
    """Keeps no gradients, only the sums of their products in blocks: :class:`BlockSums`.

    Attributes:
        blocks: the blocks, as in :func:`mfac_jax.fisher_inverse` or as a partition, for example
            from :func:`mfac_jax.pruning.step_blocks`.
        storage: how gradients are stored until they are added.

    Raises:
        TypeError: ``storage`` is not a storage of single gradients.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import fisher_inverse, rows
        >>> gradients = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> sums = rows.as_rows(gradients, storage=rows.InBlocks(2))
        >>> fisher_inverse(sums, damping=0.5, blocks=2).diagonal()
        Array([1. , 0.4], dtype=float32)
    """

    blocks: Blocks | Partition
    storage: Storage = Dense()  # noqa: RUF009  (immutable)

    def __post_init__(self) -> None:
        if isinstance(check_storage(self.storage), InBlocks):
            raise TypeError(f"storage must keep single gradients, got {self.storage!r}.")

    @property
    def has_products(self) -> bool:
        """False."""
        return False

    def bytes_by_place(self, params: PyTree, num_rows: int) -> dict[str, int]:
        """See :meth:`Storage.bytes_by_place`."""
        return traced_bytes(self, params, num_rows)

    def check_blocks(self, layout: Layout, wanted: Partition) -> None:
        """See :meth:`Storage.check_blocks`."""
        _check_runs(self._cut(layout), wanted)

    def _cut(self, layout: Layout) -> Partition:
        given = self.blocks
        return given if isinstance(given, Partition) else partition(layout, given)

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
        cut = self._cut(layout)
        check_partition(cut, layout)
        if not cut.num_blocks:
            raise ValueError("sums in blocks need at least one block, got none.")
        # Half of the memory of the sums.
        most = sum(run.width * run.size for run in cut.runs) // (2 * layout.size)
        what = f"InBlocks with storage={self.storage!r}"
        if not self.storage.is_traceable:  # before it makes files
            raise TypeError(f"{what} needs rows that jit can trace.")
        buffer = self.storage.empty(params, min(n, max(most, 1)))
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
    single gradients. Sums of full rank are as accurate as those that dense rows compute. Rounding
    adds to the diagonal of sums of lower rank (:func:`mfac_jax.algebra.square_root`), which matters
    for dampings far below the mean of the diagonal.

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
        return scaled(self.total, jnp.asarray(1 / self.num_rows, self.dtype))

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
        small = are_small(gradients, dtype=self.dtype, num_rows=self.num_rows)
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
            gradients = taken(gradients, done, length=min(len(small), length))
        buffer, stored = self.buffer.write_rows(slot, gradients, count)
        held, accepted = noted(self.held, accepted, stored, small, slot, done, count)
        rows = replace(self, buffer=buffer, held=held, num_written=self.num_written + count)
        is_last = rows.num_written == self.num_rows
        if slot + count == length or is_last:
            sums = added(self.blocks, self.total, held, buffer, self.partition)
            blocks, total, held = sums
            rows = replace(rows, blocks=blocks, total=total, held=held)
        if is_last:
            roots = square_roots(rows.blocks, self.partition, num_rows=self.num_rows)
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
        return map_roots(*held, same, function, leaves, tuple(constants), by_run=by_run)

    def _match(self, other: Partition) -> Bool[Array, ""] | None:
        """Checks that the other partition has the same blocks.

        Returns:
            Whether it has, if that depends on traced orders; otherwise None.
        """
        own = self.partition
        _check_runs(own, other)
        same: bool | Array = True
        if own.order is not other.order:
            end = own.runs[-1].start + own.runs[-1].width
            orders = [
                jnp.arange(end, dtype=jnp.int32) if order is None else order[:end]
                for order in (own.order, other.order)
            ]
            same = jnp.all(orders[0] == orders[1])
        if isinstance(same, jax.core.Tracer):
            return same
        if not same:
            _refuse_blocks(own, other)
        return None

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        del lower
        if matrix is not None:
            self._refuse("products with a matrix")
        means = self.map_blocks(self.partition, _mean_squares)
        return scaled(means, jnp.asarray(self.num_rows, self.dtype))

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


def _check_runs(own: Partition, other: Partition) -> None:
    if own.runs != other.runs:
        _refuse_blocks(own, other)


def _refuse_blocks(own: Partition, other: Partition) -> NoReturn:
    raise ValueError(
        "sums in blocks serve the blocks that they were made for: expected "
        f"{_described(own)}, got {_described(other)}."
    )


def _described(partition: Partition) -> str:
    sizes = ", ".join(f"{run.count} of {run.size}" for run in partition.runs)
    order = "in order" if partition.order is None else "in an order of their own"
    return f"blocks {sizes} coordinates, {order}"


def _mean_squares(batch: Float[Array, "b n B"]) -> Float[Array, "b B"]:
    return jnp.sum(batch * batch, axis=1) / batch.shape[1]
