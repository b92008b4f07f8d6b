"""The network that is pruned, with its prunable leaves turned all the way.

Gradients that are collected of turned parameters lie in the order in which groups and blocks
are cut, so that nothing has to be copied into it.
"""

from __future__ import annotations

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
    def orders(self) -> tuple[tuple[int, ...], ...]:
        """The axes of every leaf in the order in which prunable ones are turned."""
        turned = iter(self.grouping.orders)
        pairs = zip(self.layout.shapes, self.keep, strict=True)
        return tuple(next(turned) if kept else tuple(range(len(shape))) for shape, kept in pairs)

    def tree(self, leaves: Sequence[Array], selected: Sequence[Array]) -> PyTree:
        """All parameters, from all leaves and the new prunable ones."""
        return jax.tree.unflatten(self.layout.treedef, merge(leaves, selected, self.keep))

    def turned(self, params: PyTree) -> PyTree:
        """The caller's parameters, turned."""
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
        return jax.tree.unflatten(self.layout.treedef, transposed(leaves, self.orders))

    def back(self, params: PyTree) -> PyTree:
        """And back."""
        return _back(params, self.orders)

    def mask(self, leaves: Sequence[Array], alive: Sequence[Array]) -> PyTree:
        """The caller's mask with what is alive of the turned prunable leaves."""
        return self.tree(leaves, transposed_back(alive, self.grouping.orders))


@dataclass(frozen=True)
class TurnedLoss:
    """The loss of turned parameters; equal to another of the same function and network.

    What is not prunable counts as constant: nobody asks for those gradients, which would take
    their share of the time.
    """

    loss_fn: LossFn
    orders: tuple[tuple[int, ...], ...]
    keep: tuple[bool, ...]

    def __call__(self, params: PyTree, batch: PyTree) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(leaves, self.keep, strict=True)
        leaves = [leaf if kept else jax.lax.stop_gradient(leaf) for leaf, kept in pairs]
        return self.loss_fn(_back(jax.tree.unflatten(treedef, leaves), self.orders), batch)


def _back(params: PyTree, orders: tuple[tuple[int, ...], ...]) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, transposed_back(leaves, orders))
