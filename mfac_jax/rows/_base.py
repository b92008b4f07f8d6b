"""The interface of stored gradients, in three capabilities.

All rows but :class:`BlockSums` compute products (:class:`GradientRows`). Writing
(:class:`WritableRows`) and access to columns (:class:`ColumnRows`) are optional. An algorithm that
needs one of them calls ``check_writable`` or ``check_columns``.
"""

from __future__ import annotations

import abc
import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mfac_jax._layout import Layout, PyTree, where
from mfac_jax.rows._map import map_columns
from mfac_jax.rows._partition import Partition, check_partition, pieces_of

# The number of rows that are multiplied at a time by all other rows. They take little memory beside
# the gradients and are enough for a matrix product.
ROWS_AT_A_TIME = 16

Writable = TypeVar("Writable", bound="WritableRows")


class GradientRows(abc.ABC):
    """``m`` gradients ``g_1 .. g_m`` in R^d, the rows of ``G``; immutable.

    A vector of R^d is a tree with the structure of the parameters. Results are in the
    accumulation dtype, which is float32 at least.

    Rows that ``jit`` can trace are a pytree, usually a frozen dataclass under
    ``jax.tree_util.register_dataclass``. Keep ``layout`` as a child, not as static metadata, and
    all other fields that are not arrays static. A layout is a node without leaves:
    ``optax.tree.map_params`` puts a placeholder in its place, and then maps leaves that lie as
    the parameters do; a checkpoint restores the arrays around it. The placeholder is no
    ``Layout``, so annotate the field as ``Any`` if annotations are checked.

    Other rows, such as rows in the memory of the host, set ``is_traceable`` to false and need not
    be a pytree. Their methods run outside of ``jit``.

    Attributes:
        layout: the parameters that the gradients belong to.
        num_rows: ``m``; rows not yet written are zero.
        implementation: which implementation the kernels use; None, the default, selects the best
            one on each platform.
    """

    layout: Layout
    num_rows: int
    implementation: str | None = None

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The accumulation dtype, which is also the dtype of every n x n quantity."""

    @property
    def is_traceable(self) -> bool:
        """Whether ``jit`` can trace the rows.

        If true, each default method runs as one compiled program.
        """
        return True

    @property
    def has_products(self) -> bool:
        """Whether ``dots``, ``combine`` and ``gram`` exist; false for :class:`BlockSums`.

        Rows without products are finite: gradients were checked as they were written.
        """
        return True

    def step_bytes(self, platform: str) -> int:  # noqa: ARG002
        """An estimate, for plans, of what a ``put`` and a ``combine`` in one program take.

        It counts the temporary arrays on each device, beside the rows, the gradient and the result.
        By default these are three vectors of the accumulation dtype.

        Args:
            platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        """
        return 3 * self.layout.size * self.dtype.itemsize

    @abc.abstractmethod
    def dots(self, vector: PyTree) -> Float[Array, " m"]:
        """``G v``."""

    @abc.abstractmethod
    def combine(
        self,
        coefficients: Float[Array, " m"],
        *,
        vector: PyTree | None = None,
        scale: Float[Array, ""] | None = None,
    ) -> PyTree:
        """``scale G^T c``, or ``scale (v - G^T c)``, in one pass.

        Args:
            coefficients: ``c``.
            vector: ``v``, a tree like the parameters; without it the result is ``scale G^T c``.
            scale: the factor of the result; 1 by default.
        """

    @abc.abstractmethod
    def gram(self, mask: PyTree | None = None) -> Float[Array, "m m"]:
        """``G G^T``, over the coordinates where ``mask`` is true; over all without a mask."""

    def products(self, other: GradientRows, mask: PyTree | None = None) -> Float[Array, "m k"]:
        """``G H^T`` for other gradients ``H`` of the same parameters.

        The default combines one row of ``G`` after another and multiplies ``H`` by it.

        Args:
            other: ``H``.
            mask: a tree of booleans like the parameters; the products run over the coordinates
                where it is true.
        """
        keep = None if mask is None else self.layout.check_mask(mask)
        if self.is_traceable and other.is_traceable:
            return _products(self, other, keep)
        units = np.eye(self.num_rows, dtype=self.dtype)
        return jnp.stack([_products_of_row(self, other, keep, jnp.asarray(u)) for u in units])

    def transform(self, matrix: Float[Array, "k m"], *, lower: bool = False) -> GradientRows:
        """``M G``, in the accumulation dtype; dense rows by default.

        Args:
            matrix: ``M``.
            lower: whether ``M`` is lower triangular, which can save time.
        """
        # Imported here because DenseRows derives from the classes of this module.
        from mfac_jax.rows._dense import DenseRows

        del lower
        if self.is_traceable:
            blocks = jax.vmap(self.combine)(matrix)
        else:
            blocks = jax.tree.map(lambda *x: jnp.stack(x), *map(self.combine, matrix))
        return DenseRows(blocks, self.layout, len(matrix), "leaf")

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        """``diag((M G)^T (M G))``, without storing ``M G``.

        The default transforms some rows of ``M`` at a time.

        Args:
            matrix: ``M``; the identity by default.
            lower: whether ``M`` is lower triangular, which can save time.
        """
        del lower
        matrix = jnp.eye(self.num_rows, dtype=self.dtype) if matrix is None else matrix
        return square_sums_by_rows(self, matrix, ROWS_AT_A_TIME)

    def both_column_square_sums(
        self, matrix: Float[Array, "k m"], *, lower: bool = False
    ) -> tuple[PyTree, PyTree]:
        """:meth:`column_square_sums` without and with a matrix.

        Args:
            matrix: ``M``.
            lower: whether ``M`` is lower triangular, which can save time.

        Returns:
            ``diag(G^T G)`` and ``diag((M G)^T (M G))``.
        """
        return self.column_square_sums(), self.column_square_sums(matrix, lower=lower)


class WritableRows(GradientRows):
    """Rows that can be written."""

    @abc.abstractmethod
    def put(
        self: Writable, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[Writable, Float[Array, " m"], Bool[Array, ""]]:
        """Writes a gradient and multiplies all rows by it.

        A gradient that is not finite or is too large (:func:`is_small_enough`) is rejected:
        the rows do not change, and the products have no meaning.

        Args:
            row: the row to write.
            gradient: a tree like the parameters.

        Returns:
            The new rows; ``G g`` of the new rows with the stored ``g``; and whether the gradient
            was accepted.
        """

    @abc.abstractmethod
    def write(
        self: Writable, row: Int[Array, ""], gradient: PyTree
    ) -> tuple[Writable, Bool[Array, ""]]:
        """:meth:`put` without the products, which saves the scan."""

    @abc.abstractmethod
    def clear(self: Writable, row: Int[Array, ""]) -> Writable:
        """Sets a row to zero; a row of ``m`` or above changes nothing."""

    @abc.abstractmethod
    def restrict(self: Writable, mask: PyTree) -> Writable:
        """Sets the coordinates where ``mask`` is false to zero, in every row."""

    def without_errors(self: Writable) -> Writable:
        """The rows without what their gradients have lost and the next one would receive.

        For gradients that do not follow on those before. The default keeps no such errors.
        """
        return self

    def write_rows(
        self: Writable, first: int | Int[Array, ""], gradients: PyTree, count: int | Int[Array, ""]
    ) -> tuple[Writable, Bool[Array, " k"]]:
        """Writes the first ``count`` of k stacked gradients to ``rows[first : first + count]``.

        Outside ``jit`` these rows are donated, so use the returned rows. If ``jit`` cannot trace
        the rows, the default writes one gradient after another.

        Args:
            first: the first row, at least 0.
            gradients: a tree like the parameters with leaves ``(k, *shape)``.
            count: the number of gradients to write; at most k.

        Returns:
            The new rows, and which gradients were accepted; (k,).
        """
        if self.is_traceable:
            return _write_rows(self, first, gradients, count)
        rows, accepted = self, np.ones(_length(gradients), bool)
        for i in range(int(count)):
            gradient = jax.tree.map(operator.itemgetter(i), gradients)
            rows, is_good = rows.write(jnp.asarray(first + i), gradient)
            accepted[i] = is_good
        return rows, jnp.asarray(accepted)


class ColumnRows(GradientRows):
    """Rows whose columns can be read."""

    @abc.abstractmethod
    def take(self, coordinates: Int[Array, " k"]) -> Float[Array, "m k"]:
        """The given coordinates of every row."""

    def columns(self, start: int | Int[Array, ""], size: int) -> Float[Array, "m size"]:
        """The coordinates ``start .. start + size - 1`` of every row."""
        return self.take(start + jnp.arange(size, dtype=jnp.int32))

    def map_blocks(
        self,
        partition: Partition,
        function: Callable[..., Any],
        *vectors: PyTree,
        constants: PyTree = (),
        by_run: bool = False,
    ) -> Any:
        """Applies ``function`` to all blocks of a partition, some at a time.

        The rows drive the loop, because they know how to read their columns efficiently.

        Args:
            partition: the blocks.
            function: ``function(batch, *parts, *constants)``. ``batch`` holds the gradients of
                b blocks of one size, (b, n, B). (:class:`BlockSums` gives B other rows with the
                same ``G_b^T G_b / n``, so take n from the batch.) Each of ``parts`` holds the
                part of one vector, (b, B). The function returns one number for each coordinate,
                (b, B), or one for each block, (b,), or a tuple of such results. It is hashable.
                Functions that do the same compare equal, so that they compile once. A block may be
                padded with coordinates where the gradients and vectors are 0 (or false), and a
                batch with blocks of such coordinates.
            vectors: trees like the parameters, of numbers or booleans.
            constants: arrays that every call receives whole.
            by_run: return the results as they are, for each run of blocks. The function may then
                return any pytree of arrays (b, ...).

        Returns:
            For a result with one number for each coordinate, a tree like the parameters; it is 0
            (or false) at coordinates outside all blocks. For a result with one number for each
            block, an array in the order of the blocks. With ``by_run``, a tuple with the result
            of all blocks of each run.

        Raises:
            TypeError: ``partition`` has another type.
            ValueError: the partition or a vector does not fit, or ``by_run`` is set for blocks
                that are not of consecutive coordinates.
        """
        check_partition(partition, self.layout, by_run=by_run)
        leaves = tuple(leaves_of(self.layout, vector) for vector in vectors)
        mapped = _map_blocks if self.is_traceable else map_columns
        return mapped(self, partition, function, leaves, tuple(constants), by_run=by_run)

    def column_square_sums(
        self, matrix: Float[Array, "k m"] | None = None, *, lower: bool = False
    ) -> PyTree:
        """See :meth:`GradientRows.column_square_sums`. The default reads pieces of columns."""
        del lower
        constants = () if matrix is None else (matrix,)
        pieces = pieces_of(self.layout.size, self.num_rows)
        return self.map_blocks(pieces, _square_sums, constants=constants)

    def both_column_square_sums(
        self, matrix: Float[Array, "k m"], *, lower: bool = False
    ) -> tuple[PyTree, PyTree]:
        """See :meth:`GradientRows.both_column_square_sums`. The default is one pass."""
        del lower
        pieces = pieces_of(self.layout.size, self.num_rows)
        return self.map_blocks(pieces, _both_square_sums, constants=(matrix,))


def leaves_of(layout: Layout, vector: PyTree) -> tuple[Array, ...]:
    """The leaves of a tree of numbers or booleans like the parameters, checked."""
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(vector)}
    check = layout.check_mask if dtypes == {jnp.dtype(bool)} else layout.check
    return tuple(map(jnp.asarray, check(vector, "vectors")))


def _square_sums(
    batch: Float[Array, "b n B"], matrix: Float[Array, "k n"] | None = None
) -> Float[Array, "b B"]:
    if matrix is not None:
        batch = jnp.einsum("kn,bnj->bkj", matrix, batch, precision="highest")
    return jnp.sum(batch * batch, axis=1)


def _both_square_sums(
    batch: Float[Array, "b n B"], matrix: Float[Array, "k n"]
) -> tuple[Float[Array, "b B"], Float[Array, "b B"]]:
    return _square_sums(batch), _square_sums(batch, matrix)


def _products_of_row(
    first: GradientRows,
    second: GradientRows,
    mask: list[Array] | None,
    unit: Float[Array, " m"],
) -> Float[Array, " k"]:
    """``H g`` for the row ``g`` of the first that ``unit`` selects, over a mask."""
    leaves = jax.tree.leaves(first.combine(unit))
    if mask is not None:
        leaves = _where(mask, leaves)
    return second.dots(jax.tree.unflatten(second.layout.treedef, leaves))


_where = jax.jit(where)


@jax.jit
def _products(
    first: GradientRows, second: GradientRows, mask: list[Array] | None
) -> Float[Array, "m k"]:
    """``G H^T`` from products only, some rows of the first at a time."""
    of_row = functools.partial(_products_of_row, first, second, mask)
    units = jnp.eye(first.num_rows, dtype=first.dtype)
    return jax.lax.map(of_row, units, batch_size=min(ROWS_AT_A_TIME, first.num_rows))


def square_sums_by_rows(rows: GradientRows, matrix: Float[Array, "k m"], count: int) -> PyTree:
    """``diag((M G)^T (M G))`` from ``M' G`` for ``count`` rows ``M'`` of ``M`` at a time."""
    count = min(count, len(matrix))
    padded = jnp.pad(matrix, ((0, -len(matrix) % count), (0, 0)))
    parts = padded.reshape(-1, count, rows.num_rows)
    zeros = rows.layout.unflatten(jnp.zeros(rows.layout.size, rows.dtype))
    if rows.is_traceable:
        return _sum_of_parts(rows, zeros, parts)
    return functools.reduce(functools.partial(_add_square_sums, rows), parts, zeros)


@jax.jit
def _sum_of_parts(rows: GradientRows, zeros: PyTree, parts: Float[Array, "p k m"]) -> PyTree:
    def add(total: PyTree, part: Float[Array, "k m"]) -> tuple[PyTree, None]:
        return _add_square_sums(rows, total, part), None

    return jax.lax.scan(add, zeros, parts)[0]


def _add_square_sums(rows: GradientRows, total: PyTree, part: Float[Array, "k m"]) -> PyTree:
    return jax.tree.map(jnp.add, total, rows.transform(part).column_square_sums())


def _length(gradients: PyTree) -> int:
    """The number of stacked gradients."""
    leaves = jax.tree.leaves(gradients)
    return len(leaves[0]) if leaves else 1


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(
    rows: Writable, first: Int[Array, ""], gradients: PyTree, count: Int[Array, ""]
) -> tuple[Writable, Bool[Array, " k"]]:
    def write(
        i: Int[Array, ""], carry: tuple[Writable, Bool[Array, " k"]]
    ) -> tuple[Writable, Bool[Array, " k"]]:
        rows, accepted = carry
        rows, is_good = rows.write(first + i, jax.tree.map(lambda g: g[i], gradients))
        return rows, accepted.at[i].set(is_good)

    return jax.lax.fori_loop(0, count, write, (rows, jnp.ones(_length(gradients), bool)))


_map_blocks = jax.jit(map_columns, static_argnames=("function", "by_run"))


def is_small_enough(square: Float[Array, "*k"], num_rows: int) -> Bool[Array, "*k"]:
    """Whether ``|g|^2`` and sums of it over the rows are finite.

    :meth:`WritableRows.put` accepts such gradients and no others.
    """
    return square <= jnp.finfo(square.dtype).max / (4 * num_rows)


def check_rows(rows: Any) -> GradientRows:
    """Checks that ``rows`` are gradient rows, and returns them.

    Raises:
        TypeError: ``rows`` has another type.
    """
    if not isinstance(rows, GradientRows):
        raise TypeError(
            "rows must be gradient rows (from mfac_jax.collect_gradients or "
            f"mfac_jax.rows.as_rows), got {type(rows).__name__}."
        )
    return rows


def check_columns(rows: Any, what: str) -> ColumnRows:
    """Checks that the columns of ``rows`` can be read, and returns the rows.

    Args:
        rows: the rows.
        what: what needs the columns, for the error.

    Raises:
        TypeError: the columns cannot be read, or ``rows`` are not gradient rows.
    """
    if not isinstance(check_rows(rows), ColumnRows):
        raise TypeError(
            f"{what} needs rows whose columns can be read (mfac_jax.rows.ColumnRows), "
            f"got {type(rows).__name__}, which cannot."
        )
    return rows


def check_writable(rows: Any, what: str) -> WritableRows:
    """Checks that gradients can be written into ``rows``, and returns the rows.

    Args:
        rows: the rows.
        what: what needs to write, for the error.

    Raises:
        TypeError: gradients cannot be written, or ``rows`` are not gradient rows.
    """
    if not isinstance(check_rows(rows), WritableRows):
        raise TypeError(
            f"{what} needs rows that can be written (mfac_jax.rows.WritableRows), "
            f"got {type(rows).__name__}, which cannot."
        )
    return rows


def check_products(rows: GradientRows, what: str) -> None:
    """Checks that ``rows`` can be multiplied.

    Args:
        rows: the rows.
        what: what needs products, for the error.

    Raises:
        TypeError: the rows have no products.
    """
    if not rows.has_products:
        raise TypeError(
            f"{what} needs products with the gradients, got {type(rows).__name__}, which keeps "
            "sums in blocks and no gradients."
        )


def check_traceable(rows: GradientRows, what: str) -> None:
    """Checks that ``jit`` can trace ``rows``.

    Args:
        rows: the rows.
        what: what needs it, for the error.

    Raises:
        TypeError: ``jit`` cannot trace them.
    """
    if not rows.is_traceable:
        raise TypeError(
            f"{what} needs rows that jit can trace, got {type(rows).__name__} (is_traceable=False)."
        )
