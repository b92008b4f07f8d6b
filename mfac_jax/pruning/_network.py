"""The network that is pruned, with its prunable leaves turned all the way.

Gradients that are collected of turned parameters lie in the order in which groups and blocks
are cut, so that nothing has to be copied into it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mfac_jax._layout import Layout, PyTree
from mfac_jax.gradients import LossFn
from mfac_jax.pruning._patterns import Grouping
from mfac_jax.pruning._step import merge
from mfac_jax.rows import transposed, transposed_back

Orders = tuple[tuple[int, ...], ...]


class Network(NamedTuple):
    """What does not change from step to step.

    Attributes:
        layout: all parameters, as the caller has them.
        keep: which of them are prunable.
        grouping: the groups of those.
    """

    layout: Layout
    keep: tuple[bool, ...]
    grouping: Grouping

    @property
    def orders(self) -> Orders:
        """The axes of every leaf in the order in which prunable ones are turned."""
        turned = iter(self.grouping.orders)
        pairs = zip(self.layout.shapes, self.keep, strict=True)
        return tuple(next(turned) if kept else tuple(range(len(shape))) for shape, kept in pairs)

    def tree(self, leaves: Sequence[Array], selected: Sequence[Array]) -> PyTree:
        """All parameters, from all leaves and the new prunable ones."""
        return jax.tree.unflatten(self.layout.treedef, merge(leaves, selected, self.keep))

    def turned(self, params: PyTree, mask: Sequence[Array]) -> tuple[PyTree, tuple[Array, ...]]:
        """The caller's parameters, turned and 0 where nothing is alive, and the mask, turned."""
        leaves, alive = _turned(tuple(jax.tree.leaves(params)), tuple(mask), orders=self.orders)
        return jax.tree.unflatten(self.layout.treedef, leaves), alive

    def back(
        self, params: PyTree, mask: Sequence[Array], alive: Sequence[Array]
    ) -> tuple[PyTree, PyTree]:
        """The parameters and the mask as the caller has them.

        Args:
            params: turned.
            mask: that of the caller, whose leaves that are not prunable stay as they are.
            alive: the mask of the prunable leaves, turned.
        """
        leaves, kept = _back(
            tuple(jax.tree.leaves(params)),
            tuple(alive),
            orders=self.orders,
            alive_orders=self.grouping.orders,
        )
        return jax.tree.unflatten(self.layout.treedef, leaves), self.tree(mask, kept)


@functools.partial(jax.jit, static_argnames="orders")
def _turned(
    leaves: tuple[Array, ...], mask: tuple[Array, ...], *, orders: Orders
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    pairs = zip(leaves, mask, strict=True)
    kept = [jnp.where(alive, leaf, jnp.zeros_like(leaf)) for leaf, alive in pairs]
    return transposed(kept, orders), transposed(mask, orders)


@functools.partial(jax.jit, static_argnames=("orders", "alive_orders"))
def _back(
    leaves: tuple[Array, ...], alive: tuple[Array, ...], *, orders: Orders, alive_orders: Orders
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return transposed_back(leaves, orders), transposed_back(alive, alive_orders)


@dataclass(frozen=True)
class TurnedLoss:
    """The loss of turned parameters; equal to another of the same function and network.

    What is not prunable counts as constant: nobody asks for those gradients, which would take
    their share of the time.
    """

    loss_fn: LossFn
    orders: Orders
    keep: tuple[bool, ...]

    def __call__(self, params: PyTree, batch: PyTree) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(leaves, self.keep, strict=True)
        leaves = [leaf if kept else jax.lax.stop_gradient(leaf) for leaf, kept in pairs]
        leaves = list(transposed_back(leaves, self.orders))
        return self.loss_fn(jax.tree.unflatten(treedef, leaves), batch)
