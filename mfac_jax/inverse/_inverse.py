"""The inverse of the damped Fisher of given gradients, whole or in blocks.

The whole inverse follows from G and ``A = n lambda I + G G^T = L L^T``:

    F^-1 v = (v - G^T A^-1 G v) / lambda
    F^-1 G^T a = n G^T A^-1 a

It takes scans of the rows and n x n work. In blocks, each block is inverted on its cheaper side
(:mod:`mfac_jax.inverse._factored`). Nothing d-sized is stored unless :meth:`FisherInverse.whiten`
is called.

The paper's recursion (its equations 3 to 6) computes the rows of ``W = L^-1 G`` one by one: its
``h_i / sqrt(n + g_i . h_i)`` is row i of ``W / sqrt(lambda)``. One Cholesky factorization does
that work as matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from mfac_jax import _checks, algebra
from mfac_jax._layout import PyTree
from mfac_jax.inverse import _block_functions as of_blocks
from mfac_jax.inverse import _stored, _whole
from mfac_jax.inverse._block_inverse import block_ihvp, block_inverse_diagonal
from mfac_jax.inverse._coordinates import as_coordinates, as_pairs
from mfac_jax.inverse._factored import Inverted, invert_blocks
from mfac_jax.rows import Blocks, ColumnRows, GradientRows, Partition, partition
from mfac_jax.rows._base import check_columns, check_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FisherInverse:
    """``F^-1`` of gradients, a mask, a damping and blocks; see :func:`fisher_inverse`.

    An immutable pytree. Gradients count as 0 where the mask is false, so ``F`` is ``lambda I``
    there.

    Attributes:
        rows: ``G``; n gradients of d entries.
        mask: which coordinates take part, a tree of booleans like the parameters; None for all.
        damping: ``lambda``; scalar.
        blocks: the blocks of the Fisher.
        gram: ``G G^T`` over the mask; (n, n). None in blocks.
        factor: ``L`` of ``A = n lambda I + G G^T``; None in blocks.
        whitened: ``W = L^-1 G``; in blocks, the inverses of the blocks, run by run. None until
            :meth:`whiten` stores them.
    """

    rows: GradientRows
    mask: PyTree | None
    damping: Float[Array, ""]
    blocks: Partition
    gram: Float[Array, "n n"] | None
    factor: algebra.Factor | None
    whitened: GradientRows | tuple[Inverted, ...] | None = None

    @classmethod
    def of(
        cls,
        rows: GradientRows,
        mask: PyTree | None,
        damping: Float[Array, ""],
        blocks: Partition,
        gram: Float[Array, "n n"] | None = None,
    ) -> FisherInverse:
        """Makes the inverse of these attributes without checking them.

        The mask must be false at coordinates outside all blocks; results there have no meaning.
        ``gram`` is computed if it is needed and not given.
        """
        if products_suffice(rows, blocks):
            return cls.whole(rows, mask, damping, blocks, gram)
        return cls(rows, mask, damping, blocks, None, None)

    @classmethod
    def whole(
        cls,
        rows: GradientRows,
        mask: PyTree | None,
        damping: Float[Array, ""],
        blocks: Partition,
        gram: Float[Array, "n n"] | None = None,
    ) -> FisherInverse:
        """:meth:`of` for one block of any size, always with an n x n factor."""
        gram = rows.gram(mask) if gram is None else gram
        return cls(rows, mask, damping, blocks, gram, _whole.factor(gram, damping))

    def ihvp(self, vector: PyTree) -> PyTree:
        """``F^-1 v``. The whole inverse takes two scans, O(d n).

        In float32 the part of ``v`` inside the span of the gradients loses about
        ``eps |g|^2 / lambda`` to cancellation, in the whole inverse and in blocks of B > n. For
        a combination of the gradients themselves use :meth:`combination`.

        Args:
            vector: ``v``, a tree like the parameters or one flat vector (d,).

        Returns:
            ``F^-1 v`` in the form and the dtypes of ``vector``.

        Raises:
            ValueError: ``vector`` does not fit the parameters.
        """
        layout = self.rows.layout
        tree = layout.as_tree(vector, "vector")
        if self.factor is None:
            return layout.like(self._in_blocks("apply", tree, alone=block_ihvp), vector)
        inside = self._where_in(tree)
        solved = self._solve(self.rows.dots(inside))
        out = self.rows.combine(solved, vector=inside, scale=1 / self.damping)
        if self.mask is not None:
            out = _whole.where_or_scaled(self.mask, out, tree, self.damping)
        return layout.like(out, vector)

    def combination(self, coefficients: Float[ArrayLike, " n"]) -> PyTree:
        """``F^-1 G^T a = n G^T A^-1 a``, without a subtraction and hence without cancellation.

        The whole inverse takes one scan, O(d n + n^2). Equal gradients share a coefficient
        (:func:`mfac_jax.algebra.share_between_equal_rows`).

        Args:
            coefficients: ``a``; (n,), one for each gradient.

        Returns:
            ``F^-1 G^T a``, a tree like the parameters.

        Raises:
            ValueError: ``coefficients`` are not (n,).
        """
        n = self.rows.num_rows
        if jnp.shape(coefficients) != (n,):
            raise ValueError(
                f"coefficients must have shape ({n},), one for each gradient; "
                f"got {jnp.shape(coefficients)}."
            )
        a = jnp.asarray(coefficients, self.rows.dtype)
        if self.factor is None:
            combination = self._implemented(of_blocks.combination)
            return self._map("combination", self.blocks, combination, constants=(a,))
        return self._where_in(self.rows.combine(self._shared_solve(a, n)))

    def compensate(self, vector: PyTree) -> PyTree:
        """``G_K^T (n lambda I + G_K G_K^T)^-1 G v`` for the coordinates K where the mask is true.

        Let ``v`` be weights outside of K that are removed. This change of the weights in K
        compensates for them: it minimises ``delta^T F delta`` over ``delta_K`` for
        ``delta = delta_K - v``. It is computed without a subtraction.

        Args:
            vector: ``v``, a tree like the parameters.

        Returns:
            A tree like the parameters, 0 where the mask is false.

        Raises:
            ValueError: ``vector`` does not fit the parameters.
        """
        tree = self.rows.layout.as_tree(vector, "vector")
        if self.factor is None:
            masks = () if self.mask is None else (self.mask,)
            compensate = self._implemented(of_blocks.compensate)
            return self._columns("compensate").map_blocks(
                self.blocks, compensate, *masks, tree, constants=(self.damping,)
            )
        return self._where_in(self.rows.combine(self._shared_solve(self.rows.dots(tree), 1)))

    def diagonal(self) -> PyTree:
        """``diag(F^-1)``, a tree like the parameters. O(d n min(n, B)); O(d n) if whitened.

        An entry is never below ``1 / F_jj``, its lower bound for any positive definite ``F``,
        even after rounding. It is ``1 / lambda`` where the mask is false and at coordinates
        outside all blocks. For many gradients, the computation needs a fraction of their memory.
        """
        if self.factor is None:
            found = self._in_blocks("diagonal", alone=block_inverse_diagonal)
            return _whole.filled(found, self.damping)
        rows, whitened = self._columns("diagonal"), self._whitened_rows
        if whitened is None:
            lower = _whole.inverse_lower(self.factor)
            squares, inner = rows.both_column_square_sums(lower, lower=True)
        else:
            squares, inner = rows.column_square_sums(), whitened.column_square_sums()
        return _whole.diagonal(inner, squares, self.damping, self.mask, num_rows=rows.num_rows)

    def group_blocks(
        self,
        groups: Partition | int | None,
        function: Callable[..., Any],
        *vectors: PyTree,
        constants: PyTree = (),
    ) -> Any:
        """Applies a function to the blocks ``[F^-1]_QQ`` of groups of coordinates Q.

        Args:
            groups: for the whole inverse, the groups as a partition. In blocks, the number of
                neighbours that make a group; it divides the size of every block. None makes
                every block one group.
            function: ``function(group_blocks, *parts, *constants)``. ``group_blocks`` is a
                :class:`GroupBlocks` of a batch of groups. Each of ``parts`` holds the part of
                one vector, (``*b``, g). The function returns one number for each coordinate,
                (``*b``, g). It is hashable, and groups may be padded, as in
                :meth:`mfac_jax.rows.ColumnRows.map_blocks`.
            vectors: trees like the parameters.
            constants: arrays that every call receives whole.

        Returns:
            A tree like the parameters.

        Raises:
            TypeError: ``groups`` is a partition in blocks, or an int for the whole inverse.
            ValueError: a block is not a whole number of groups.
        """
        if self.factor is None:
            if isinstance(groups, Partition):
                raise TypeError(
                    "groups of an inverse in blocks must be an int or None, got a Partition."
                )
            if any(groups is not None and run.size % groups for run in self.blocks.runs):
                raise ValueError(
                    f"groups must divide the size of every block, got groups of {groups} in "
                    f"blocks of {sorted({run.size for run in self.blocks.runs})}."
                )
            in_blocks = of_blocks.GroupsInBlocks(function, len(vectors), groups)
            return self._map("group_blocks", self.blocks, in_blocks, *vectors, constants=constants)
        groups = self.blocks if groups is None else groups
        if not isinstance(groups, Partition):
            raise TypeError(
                "groups of a whole inverse must be a Partition or None, "
                f"got {type(groups).__name__}."
            )
        constants = (self.gram, _whole.inverse_lower(self.factor), *constants)
        of_whole = of_blocks.GroupsOfWhole(function, len(vectors))
        return self._map("group_blocks", groups, of_whole, *vectors, constants=constants)

    def entries(self, rows: ArrayLike, columns: ArrayLike) -> Float[Array, "..."]:
        """Single entries ``(F^-1)_ij``.

        In the whole inverse an entry costs O(n^2), or O(n) after :meth:`whiten`, as in the paper.
        In blocks an entry costs O(min(n, B)) and is 0 between two blocks. All blocks are inverted
        first, unless :meth:`whiten` has stored their inverses.

        Args:
            rows: flat coordinates i; any shape.
            columns: flat coordinates j; broadcast against ``rows``.

        Returns:
            The entries, in the broadcast shape; NaN for traced indices out of range.

        Raises:
            TypeError: an index is not an integer.
            ValueError: an index that is not traced lies outside 0 .. d-1.
        """
        layout = self.rows.layout
        pairs = as_pairs(rows, columns, layout.size)
        if self.factor is None:
            return _stored.entries(self._inverted(), self.blocks, self.damping, pairs)
        g, w = self._columns("entries"), self._whitened_rows
        given = g.take(pairs.rows), g.take(pairs.columns)
        whitened = None if w is None else (w.take(pairs.rows), w.take(pairs.columns))
        return _whole.entries(pairs, given, whitened, self.factor, self.damping, layout, self.mask)

    def submatrix(self, coordinates: ArrayLike) -> Float[Array, "k k"]:
        """``(F^-1)_QQ`` for the flat coordinates Q.

        Args:
            coordinates: Q; (k,).

        Returns:
            The entries; (k, k).

        Raises:
            TypeError: an index is not an integer.
            ValueError: Q is not a list, or an index that is not traced lies outside
                0 .. d-1.
        """
        q = as_coordinates(coordinates, self.rows.layout.size)
        return self.entries(q[:, None], q[None, :])

    def quadratic_form(self, vector: PyTree) -> Float[Array, ""]:
        """``v^T F^-1 v = |v - G^T c|^2 / lambda + n |c|^2`` with ``c = A^-1 G v``, in two scans.

        A sum of squares is never negative and loses nothing to cancellation. The product
        ``v . F^-1 v`` loses digits if ``v`` lies in the span of the gradients.

        Args:
            vector: ``v``, a tree like the parameters or one flat vector (d,).

        Returns:
            The value; a scalar.

        Raises:
            ValueError: ``vector`` does not fit the parameters.
        """
        tree = self.rows.layout.as_tree(vector, "vector")
        if self.factor is None:
            return jnp.sum(self._in_blocks("quadratic_form", tree))
        inside = self._where_in(tree)
        solved = self._solve(self.rows.dots(inside))
        outside = self.rows.combine(solved, vector=inside)
        if self.mask is not None:
            outside = _whole.where_or_scaled(self.mask, outside, tree, jnp.ones_like(self.damping))
        return _whole.sum_of_squares(outside, solved, self.damping)

    def log_det(self) -> Float[Array, ""]:
        """``log det F^-1 = -(d log lambda + log det(A / (n lambda)))``."""
        n, layout = self.rows.num_rows, self.rows.layout
        if self.factor is None:
            everywhere = layout.unflatten(jnp.ones(layout.size, bool))
            return jnp.sum(self._in_blocks("log_det", everywhere))
        log_lambda = jnp.log(self.damping)
        determinant = algebra.log_det(self.factor) - n * (jnp.log(n) + log_lambda)
        return -(layout.size * log_lambda + determinant)

    def sample(self, key: Key[Array, ""]) -> PyTree:
        """One draw from N(0, F^-1), a tree like the parameters.

        It is ``F^-1 (sqrt(lambda) z_d + G^T z_n / sqrt(n))`` with standard normal ``z_d`` and
        ``z_n``. The second term is computed as ``sqrt(n) G^T A^-1 z_n``, free of cancellation.

        Args:
            key: a random key.
        """
        layout, n, dtype = self.rows.layout, self.rows.num_rows, self.rows.dtype
        key_d, key_n = jax.random.split(key)
        z_d = layout.unflatten(jax.random.normal(key_d, (layout.size,), dtype))
        if self.factor is None:
            # A block of B > n coordinates needs n more numbers; it gets B.
            inner = layout.unflatten(jax.random.normal(key_n, (layout.size,), dtype))
            return self._in_blocks("sample", z_d, inner)
        z_n = jax.random.normal(key_n, (n,), dtype)
        noise = jnp.sqrt(self.damping) * jnp.sqrt(n).astype(dtype) * z_n
        solved = self._solve(noise - self.rows.dots(self._where_in(z_d)))
        return _whole.sample(z_d, self._where_in(self.rows.combine(solved)), self.damping)

    def whiten(self) -> FisherInverse:
        """The same inverse that also stores ``W = L^-1 G``, or the inverses of all blocks.

        ``W`` takes d n numbers, the inverses of blocks take d min(n, B). In the whole inverse an
        entry then costs O(n). In blocks, ``ihvp``, ``diagonal``, ``entries``,
        ``quadratic_form``, ``log_det`` and ``sample`` use the stored inverses.

        Raises:
            ValueError: the blocks are not of consecutive coordinates.
        """
        if self.factor is None:
            return replace(self, whitened=self._inverted())
        lower = _whole.inverse_lower(self.factor)
        return replace(self, whitened=self.rows.transform(lower, lower=True))

    @property
    def _whitened_rows(self) -> ColumnRows | None:
        if self.factor is None or self.whitened is None:
            return None
        return check_columns(self.whitened, "whitened rows")

    def _inverted(self) -> tuple[Inverted, ...]:
        """The inverses of all blocks: the stored ones, or new ones."""
        if isinstance(self.whitened, tuple):
            return self.whitened
        if self.blocks.order is not None:
            raise ValueError(
                "inverses are stored for blocks of consecutive coordinates only, got a "
                "partition with an order."
            )
        return self._map("storing the inverses", self.blocks, invert_blocks, by_run=True)

    def _columns(self, what: str) -> ColumnRows:
        return check_columns(self.rows, what)

    def _map(
        self,
        what: str,
        blocks: Partition,
        function: Callable[..., Any],
        *vectors: PyTree,
        constants: PyTree = (),
        by_run: bool = False,
    ) -> Any:
        """``function(batch, *parts, damping, *constants)`` of the masked gradients of blocks."""
        masks = () if self.mask is None else (self.mask,)
        return self._columns(what).map_blocks(
            blocks,
            of_blocks.Masked(function, bool(masks)),
            *masks,
            *vectors,
            constants=(self.damping, *constants),
            by_run=by_run,
        )

    def _in_blocks(
        self, method: str, *vectors: PyTree, alone: Callable[..., Any] | None = None
    ) -> Any:
        """Calls a method of inverted blocks on all blocks.

        Args:
            method: the name of the method.
            vectors: trees whose parts are the arguments of the method.
            alone: a function of the gradients with the same result. It is used if no inverses
                are stored.
        """
        if isinstance(self.whitened, tuple) and self.whitened:
            stored = self.whitened, self.blocks, self.rows.layout
            return _stored.call(*stored, vectors, method=method, dtype=self.rows.dtype)
        function = of_blocks.MethodOfInverse(method) if alone is None else self._implemented(alone)
        return self._map(method, self.blocks, function, *vectors)

    def _implemented(self, function: Callable[..., Any]) -> of_blocks.WithImplementation:
        return of_blocks.WithImplementation(function, self.rows.implementation)

    def _solve(self, dots: Float[Array, " n"]) -> Float[Array, " n"]:
        return _whole.refined_solve(self.factor, self.gram, self.damping, dots)

    def _shared_solve(self, rhs: Float[Array, " n"], scale: int) -> Float[Array, " n"]:
        """``scale A^-1 b`` for a product with ``G^T``; one program for every scale."""
        number = np.asarray(scale, self.rows.dtype)
        return _whole.shared_solve(self.factor, self.gram, self.damping, rhs, number)

    def _where_in(self, tree: PyTree) -> PyTree:
        return tree if self.mask is None else _whole.where(self.mask, tree)


def fisher_inverse(
    rows: GradientRows,
    damping: ArrayLike,
    *,
    mask: PyTree | None = None,
    blocks: Blocks = None,
) -> FisherInverse:
    """The inverse of ``F = lambda I + G^T G / n``.

    By default it is the whole inverse, from one Gram matrix and one factor: O(d n^2 + n^3). With
    ``blocks`` it is the inverse of the block-diagonal Fisher. Each call of a method then inverts
    the blocks, O(d n min(n, B)), unless :meth:`FisherInverse.whiten` has stored the inverses. All
    methods are jitted. The inverse holds the rows without a copy, but a function under ``jax.jit``
    that returns the inverse copies them.

    Args:
        rows: ``G``; n gradients of d entries. Blocks, the diagonal and entries need rows whose
            columns can be read (:class:`mfac_jax.rows.ColumnRows`).
        damping: ``lambda > 0``; a number or a scalar array.
        mask: a tree of booleans with the structure of the parameters; gradients count as 0
            where it is false, but must be finite there too. All true by default.
        blocks: None for one block of all coordinates; an int B for blocks of B
            consecutive coordinates; ``"leaf"`` for one block for each parameter; or a
            sequence of block sizes that add up to d.

    Returns:
        The inverse, a pytree that can cross ``jit``.

    Raises:
        TypeError: ``damping`` is not a number, ``blocks`` has another type, or the columns of
            the rows are needed and cannot be read.
        ValueError: ``damping`` is not positive, the blocks do not cover d, or the mask does
            not fit.
        FloatingPointError: there is a mask, and a gradient has NaN or Inf in it. Inside ``jit``
            there is no error.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import fisher_inverse, rows
        >>> gradients = rows.as_rows(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> inverse = fisher_inverse(gradients, damping=0.5)
        >>> inverse.diagonal()
        Array([1. , 0.4, 2. ], dtype=float32)

    Reference: Frantar, Kurtic, Alistarh, NeurIPS 2021, section 3.1.
    """
    layout = check_rows(rows).layout
    _checks.positive_scalar(damping, "damping")
    if mask is not None:
        mask = jax.tree.unflatten(layout.treedef, layout.check_mask(mask))
        _check_finite(rows)
    cut = partition(layout, blocks)
    if not products_suffice(rows, cut):
        check_columns(
            rows, f"an inverse with blocks={blocks!r}, n={rows.num_rows}, d={layout.size}"
        )
    return FisherInverse.of(rows, mask, jnp.asarray(damping).astype(rows.dtype), cut)


def _check_finite(rows: GradientRows) -> None:
    """Checks that gradients are finite: products read them where a mask is false, too."""
    # Zero times NaN or Inf is NaN.
    sums = rows.combine(jnp.zeros(rows.num_rows, rows.dtype))
    for path, finite in zip(rows.layout.paths, _whole.are_finite(sums), strict=True):
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise FloatingPointError(
                "gradients must be finite, also where mask is false: there is NaN or Inf in the "
                f"gradients of params{path}."
            )


def products_suffice(rows: GradientRows, blocks: Partition) -> bool:
    """Whether products of the rows suffice: one block of more than n coordinates holds all."""
    return blocks.is_whole and blocks.runs[0].size > rows.num_rows
