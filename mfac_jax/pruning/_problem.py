"""The problem of a pruning step: the argument of every score and update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mfac_jax._layout import PyTree
from mfac_jax.inverse import FisherInverse
from mfac_jax.inverse._inverse import inverse_of, uses_products, whole_inverse
from mfac_jax.pruning._blocks import FisherBlocks, blocks_under, check_groups
from mfac_jax.pruning._interface import Pattern
from mfac_jax.pruning._scope import Selection
from mfac_jax.rows import BlockRun, GradientRows, Partition, partition

Value = TypeVar("Value")


class _OfMasks(Generic[Value]):
    """One value for each mask. Two masks are the same if their leaves are the same objects."""

    def __init__(self) -> None:
        self._found: list[tuple[list[Array], Value]] = []

    def of(self, mask: PyTree, make: Callable[[], Value]) -> Value:
        """The value of a mask; ``make()`` for a new mask."""
        leaves = jax.tree.leaves(mask)
        for known, value in self._found:
            if all(a is b for a, b in zip(known, leaves, strict=True)):
                return value
        return self.add(mask, make())

    def add(self, mask: PyTree, value: Value) -> Value:
        """Keeps a value, and returns it."""
        self._found.append((jax.tree.leaves(mask), value))
        return value


class Grams:
    """``G G^T`` over several masks; each matrix is computed once."""

    def __init__(self, rows: GradientRows) -> None:
        self.rows = rows
        self._known: _OfMasks[Float[Array, "n n"]] = _OfMasks()

    def of(self, mask: PyTree) -> Float[Array, "n n"]:
        """The matrix over a mask."""
        return self._known.of(mask, lambda: self.rows.gram(mask))

    def add(self, mask: PyTree, gram: Float[Array, "n n"]) -> None:
        """Keeps a matrix that was computed elsewhere."""
        self._known.add(mask, gram)


class Problem:
    """Weights, gradients, a damping and blocks: the argument of every score and update.

    All trees have the structure of the caller's parameters, and every weight is in its own place.
    Each property is computed once, at its first use.

    Attributes:
        params: the parameters.
        mask: which weights are alive before the step; false in leaves that are not prunable.
        rows: the gradients. In :func:`prune` with ``history``, they are
            :class:`mfac_jax.rows.StackedRows` of several steps, and the rows of steps to come
            are zero.
        damping: ``lambda`` of the Fisher; scalar. The Fisher is an average over all rows, zero
            rows included. If only a fraction f of the rows holds gradients, :func:`prune`
            multiplies the damping by f. Fisher and damping are then f times those of the
            gradients alone, which give the same masks and updates.

    Example:
        The score ``"mfac"`` of single weights, as your own function:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mfac_jax import pruning, rows
        >>> def score(problem):
        ...     return jax.tree.map(lambda w, d: w**2 / (2 * d), problem.weights, problem.diagonal)
        >>> w, alive = jnp.array([[1.0, 0.1], [2.0, 0.5]]), jnp.ones((2, 2), bool)
        >>> g = rows.as_rows(jnp.ones((3, 2, 2)))
        >>> _, mask, _ = pruning.prune_step(w, alive, g, 0.25, damping=0.01, score=score)
        >>> mask.tolist()
        [[True, False], [True, True]]
    """

    def __init__(
        self,
        params: PyTree,
        mask: PyTree,
        rows: GradientRows,
        damping: Float[Array, ""],
        selection: Selection,
        blocks: FisherBlocks,
        grams: Grams,
    ) -> None:
        self.params, self.mask, self.rows, self.damping = params, mask, rows, damping
        self._selection, self._blocks, self._grams = selection, blocks, grams
        self._inverses: _OfMasks[FisherInverse] = _OfMasks()

    @property
    def pattern(self) -> Pattern:
        """Which weights can only go together."""
        return self._selection.pattern

    @property
    def has_groups(self) -> bool:
        """Whether any group of the pattern has several weights."""
        return self._selection.has_groups

    @functools.cached_property
    def weights(self) -> PyTree:
        """The alive weights, in the accumulation dtype; 0 elsewhere."""
        return self.removed(self._selection.empty_mask)

    @functools.cached_property
    def blocks(self) -> Partition:
        """The blocks of the Fisher.

        A single block of more weights than gradients is the block of all parameters: it needs
        products with the gradients only.
        """
        # The order of the weights is computed and uploaded only for what reads columns.
        if uses_products(self.rows, Partition(None, self._blocks.runs)):
            return partition(self.rows.layout, None)
        return self._ordered_blocks

    @functools.cached_property
    def _ordered_blocks(self) -> Partition:
        """The blocks of the prunable weights, with the weights of a group as neighbours."""
        return blocks_under(self._blocks, self._selection, self.mask)

    @functools.cached_property
    def inverse(self) -> FisherInverse:
        """The inverse of the Fisher over the alive weights."""
        return self.inverse_over(self.mask)

    def inverse_over(self, mask: PyTree) -> FisherInverse:
        """The inverse of the Fisher over the weights of another mask, in the same blocks.

        A second call with the same arrays returns the same inverse.

        Args:
            mask: a tree of booleans like the parameters, false where :attr:`mask` is.

        Raises:
            TypeError: the mask is not boolean.
            ValueError: the mask does not fit the parameters.
        """
        layout = self.rows.layout
        mask = jax.tree.unflatten(layout.treedef, layout.check_mask(mask))
        return self._inverses.of(mask, lambda: self._inverse_in(mask, self.blocks))

    def _inverse_in(self, mask: PyTree, blocks: Partition) -> FisherInverse:
        gram = functools.partial(self._grams.of, mask)
        return inverse_of(self.rows, mask, self.damping, blocks, gram)

    @functools.cached_property
    def _factored(self) -> FisherInverse:
        """:attr:`inverse` of one block of any size, with an n x n factor."""
        gram = self._grams.of(self.mask)
        return whole_inverse(self.rows, self.mask, self.damping, self.blocks, gram)

    @functools.cached_property
    def diagonal(self) -> PyTree:
        """The diagonal of :attr:`inverse`."""
        return self.inverse.diagonal()

    def removed(self, kept: PyTree) -> PyTree:
        """The alive weights that are not in ``kept``; 0 elsewhere."""
        return removed_weights(self.params, self.mask, kept, dtype=self.rows.dtype)

    def combine(self, scores: PyTree) -> PyTree:
        """Scores of groups: the pattern combines the scores of single weights."""
        return self._selection.combine(scores, self.mask)

    def map_blocks(self, function: Callable[..., Array]) -> PyTree:
        """Applies ``function(blocks, weights, alive)`` to ``[F^-1]_BB`` of every block B.

        Args:
            function: as in :meth:`map_groups`, with the weights of a block in place of those of a
                group. Groups of the pattern are neighbours in a block.

        Returns:
            A tree like the parameters.
        """
        groups = self._ordered_blocks if self.inverse.is_whole else None
        return self.inverse.group_blocks(groups, function, self.weights, self.mask)

    def map_groups(self, function: Callable[..., Array]) -> PyTree:
        """Applies ``function(blocks, weights, alive)`` to all groups and their ``[F^-1]_QQ``.

        Args:
            function: a function such as :meth:`Pattern.cost`. It is hashable. Functions that do
                the same compare equal; see :meth:`mfac_jax.inverse.FisherInverse.group_blocks`.

        Returns:
            A tree like the parameters.

        Raises:
            ValueError: a block of the Fisher cuts a group.
        """
        check_groups(self._blocks, self.pattern)
        size = self.pattern.group_size
        if size is None and self._blocks.given == "leaf":
            return self._map_leaves(function)
        inverse = self.inverse
        if size is None and not inverse.is_whole:
            inverse = self._factored
        groups = self._selection.partition_into_groups() if inverse.is_whole else size
        return inverse.group_blocks(groups, function, self.weights, self.mask)

    def _map_leaves(self, function: Callable[..., Array]) -> PyTree:
        """:meth:`map_groups` with one block for each leaf, if each leaf has its own group size."""
        selection, total = self._selection, jax.tree.map(jnp.zeros_like, self.weights)
        for i, size in enumerate(selection.group_sizes):
            if not selection.sizes[i]:
                continue
            groups = selection.partition_into_groups(i)
            whole = Partition(groups.order, (BlockRun(0, 1, selection.sizes[i]),))
            own = selection.mask_of_leaf(self.mask, i)
            inverse = self._inverse_in(own, whole)
            asked = groups if inverse.is_whole else size
            found = inverse.group_blocks(asked, function, self.weights, own)
            total = _add(total, found)
        return total


@functools.partial(jax.jit, static_argnames="dtype")
def removed_weights(params: PyTree, mask: PyTree, kept: PyTree, *, dtype: jnp.dtype) -> PyTree:
    """The weights that are in ``mask`` but not in ``kept``, in the structure of the masks."""
    leaves = zip(*map(jax.tree.leaves, (params, mask, kept)), strict=True)
    removed = [
        jnp.where(alive & ~stays, weight.astype(dtype), jnp.zeros((), dtype))
        for weight, alive, stays in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(mask), removed)


@jax.jit
def _add(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, y)
