"""The interface of the inverse, whole and in blocks: checks of arguments and what both share."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.inverse._block_functions import Masked
from mfac_jax.inverse._coordinates import Pairs, as_coordinates, as_pairs
from mfac_jax.rows import BlockRun, ColumnRows, GradientRows, Partition
from mfac_jax.rows._base import check_columns


@dataclass(frozen=True)
class FisherInverse(abc.ABC):
    """``F^-1`` of gradients, a mask, a damping and blocks; made by :func:`mfac_jax.fisher_inverse`.

    An immutable pytree. Gradients count as 0 where the mask is false, so ``F`` is ``lambda I``
    there.

    Attributes:
        rows: ``G``; n gradients of d entries.
        mask: which coordinates take part, a tree of booleans like the parameters; None for all.
        damping: ``lambda``; scalar.
        blocks: the blocks of the Fisher.
    """

    rows: GradientRows
    mask: PyTree | None
    damping: Float[Array, ""]
    blocks: Partition

    @property
    @abc.abstractmethod
    def is_whole(self) -> bool:
        """Whether one n x n factor holds the whole inverse; if not, blocks are inverted."""

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
        return layout.like(self._ihvp(layout.as_tree(vector, "vector")), vector)

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
        return self._combination(jnp.asarray(coefficients, self.rows.dtype))

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
        return self._compensate(self.rows.layout.as_tree(vector, "vector"))

    @abc.abstractmethod
    def diagonal(self) -> PyTree:
        """``diag(F^-1)``, a tree like the parameters. O(d n min(n, B)); O(d n) if whitened.

        An entry is never below ``1 / F_jj``, its lower bound for any positive definite ``F``,
        even after rounding. It is ``1 / lambda`` where the mask is false and at coordinates
        outside all blocks. Beside the gradients it needs only a fraction of their memory.
        """

    def group_blocks(
        self,
        groups: Partition | int | None,
        function: Callable[..., Any],
        *vectors: PyTree,
        constants: PyTree = (),
    ) -> Any:
        """Applies a function to the blocks ``[F^-1]_QQ`` of groups of coordinates Q.

        Args:
            groups: the number of neighbours that make a group; it divides the size of every
                block. None makes every block one group. The whole inverse also takes a
                partition, whose groups are of any coordinates.
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
            TypeError: ``groups`` has another type, or is a partition in blocks.
            ValueError: a block is not a whole number of groups, or a partition does not fit the
                parameters.
        """
        return self._group_blocks(groups, function, vectors, constants)

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
        return self._entries(as_pairs(rows, columns, self.rows.layout.size))

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
        return self._quadratic_form(self.rows.layout.as_tree(vector, "vector"))

    @abc.abstractmethod
    def log_det(self) -> Float[Array, ""]:
        """``log det F^-1 = -(d log lambda + log det(A / (n lambda)))``."""

    def sample(self, key: Key[Array, ""]) -> PyTree:
        """One draw from N(0, F^-1), a tree like the parameters.

        It is ``F^-1 (sqrt(lambda) z_d + G^T z_n / sqrt(n))`` with standard normal ``z_d`` and
        ``z_n``. The second term is computed as ``sqrt(n) G^T A^-1 z_n``, free of cancellation.

        Args:
            key: a random key.
        """
        layout, dtype = self.rows.layout, self.rows.dtype
        key_d, key_n = jax.random.split(key)
        noise = layout.unflatten(jax.random.normal(key_d, (layout.size,), dtype))
        return self._sample(noise, key_n)

    @abc.abstractmethod
    def whiten(self) -> FisherInverse:
        """The same inverse that also stores ``W = L^-1 G``, or the inverses of all blocks.

        ``W`` takes d n numbers, the inverses of blocks take d min(n, B). In the whole inverse an
        entry then costs O(n). In blocks, ``ihvp``, ``diagonal``, ``entries``,
        ``quadratic_form``, ``log_det`` and ``sample`` use the stored inverses.

        Raises:
            ValueError: the blocks are not of consecutive coordinates.
        """

    @abc.abstractmethod
    def _ihvp(self, tree: PyTree) -> PyTree: ...

    @abc.abstractmethod
    def _combination(self, a: Float[Array, " n"]) -> PyTree: ...

    @abc.abstractmethod
    def _compensate(self, tree: PyTree) -> PyTree: ...

    @abc.abstractmethod
    def _entries(self, pairs: Pairs) -> Float[Array, "..."]: ...

    @abc.abstractmethod
    def _quadratic_form(self, tree: PyTree) -> Float[Array, ""]: ...

    @abc.abstractmethod
    def _sample(self, noise: PyTree, key: Key[Array, ""]) -> PyTree: ...

    @abc.abstractmethod
    def _group_blocks(
        self, groups: Any, function: Callable[..., Any], vectors: tuple[PyTree, ...], constants: Any
    ) -> Any: ...

    def _neighbours(self, size: int | None) -> Partition:
        """The partition into groups of ``size`` neighbours in a block, checked.

        Raises:
            TypeError: ``size`` is not an int or None.
            ValueError: ``size`` is below 1 or does not divide the size of every block.
        """
        if size is None:
            return self.blocks
        size = _checks.positive_int(size, "groups")
        if any(run.size % size for run in self.blocks.runs):
            raise ValueError(
                f"groups must divide the size of every block, got groups of {size} in blocks of "
                f"{sorted({run.size for run in self.blocks.runs})}."
            )
        runs = (BlockRun(run.start, run.width // size, size) for run in self.blocks.runs)
        return Partition(self.blocks.order, tuple(runs))

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
            Masked(function, bool(masks)),
            *masks,
            *vectors,
            constants=(self.damping, *constants),
            by_run=by_run,
        )
