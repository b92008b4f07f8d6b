"""The order of weights in which blocks are cut.

Leaves are turned (see :mod:`mfac_jax.pruning._patterns`), and pruned weights make room: the
alive ones move together, so that a block of 128 holds 128 of them for as long as there are as
many. Weights move within one row of a segment, all coordinates or an output; what is pruned
goes to its end. The order is data, so that a new mask compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mfac_jax._layout import PyTree
from mfac_jax.inverse import Blocks
from mfac_jax.pruning._patterns import Grouping
from mfac_jax.rows import (
    GradientRows,
    PermutedRows,
    TransposedRows,
    transposed,
    transposed_back,
)


class Cut(NamedTuple):
    """How the Fisher is cut into blocks; hashable.

    Attributes:
        blocks: which blocks there are.
        segments: rows of coordinates in which weights may move, as ``(rows, width)``, in order;
            none if they stay where they are.
    """

    blocks: Blocks
    segments: tuple[tuple[int, int], ...] = ()


class Arrangement:
    """Weights in the order in which blocks are cut, and back.

    Attributes:
        rows: the gradients in this order.
        grouping: the groups in it.
    """

    rows: GradientRows

    def __init__(
        self, rows: GradientRows, mask: Sequence[Array], grouping: Grouping, cut: Cut
    ) -> None:
        self._orders, self.grouping = grouping.orders, grouping
        self.rows = rows
        if any(axes != tuple(sorted(axes)) for axes in self._orders):
            self.rows = TransposedRows.of(rows, self._orders)
        self._permuted: PermutedRows | None = None
        if cut.segments:
            flat = jnp.concatenate([jnp.ravel(leaf) for leaf in self.turned(mask)])
            order = alive_first(flat, cut.segments, grouping.size)
            self.rows = self._permuted = PermutedRows.of(self.rows, order)
            self.grouping = Grouping(grouping.pattern, (grouping.size,), ((0,),))

    def turned(self, leaves: Sequence[Array]) -> tuple[Array, ...]:
        """Leaves whose groups are rows."""
        return transposed(leaves, self._orders)

    def arranged(self, leaves: Sequence[Array]) -> PyTree:
        """Leaves, or a vector, in the order of the rows."""
        turned = self.turned(leaves)
        if self._permuted is None:
            return turned
        wide = [x.astype(self.rows.dtype) if x.dtype != jnp.bool_ else x for x in turned]
        return self._permuted.from_base(tuple(wide))

    def as_turned(self, tree: PyTree) -> tuple[Array, ...]:
        """What is arranged, as turned leaves."""
        return tuple(jax.tree.leaves(self._permuted.to_base(tree) if self._permuted else tree))

    def back(self, turned: Sequence[Array]) -> tuple[Array, ...]:
        """Turned leaves as they were."""
        return transposed_back(turned, self._orders)


def alive_first(
    alive: Bool[Array, " d"], segments: tuple[tuple[int, int], ...], group: int
) -> Int[Array, " d"]:
    """The coordinates, those of groups with a weight alive first in every row; else in order."""
    here = jnp.any(alive.reshape(-1, group), axis=1).astype(jnp.int32)
    until = jnp.cumsum(here, dtype=jnp.int32)
    before = until - here
    # Of every group, the first group of its row and their number.
    firsts: list[Array] = []
    widths: list[Array] = []
    start = 0
    for count, width in segments:
        size = width // group
        own = jnp.arange(count * size, dtype=jnp.int32)
        firsts.append(start + own // size * size)
        widths.append(jnp.full_like(own, size))
        start += count * size
    first, in_row = jnp.concatenate(firsts), jnp.concatenate(widths)
    there = before - before[first]
    own = jnp.arange(here.size, dtype=jnp.int32)
    gone = own - first - there
    alive_in_row = until[first + in_row - 1] - before[first]
    place = first + jnp.where(here > 0, there, alive_in_row + gone)
    groups = jnp.zeros_like(own).at[place].set(own, unique_indices=True)
    return (groups[:, None] * group + jnp.arange(group, dtype=jnp.int32)[None]).reshape(-1)
