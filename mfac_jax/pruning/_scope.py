"""What may be pruned and how: a :class:`Scope`, and its :class:`Selection` on given parameters.

Scores, masks and updates are trees in the caller's own coordinates. Only blocks of the Fisher and
groups of a pattern need another order. A :class:`Selection` keeps this order as an index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.pruning._budgets import Budget, as_budget
from mfac_jax.pruning._filters import PathFilter, as_filter, prunable
from mfac_jax.pruning._interface import (
    Groups,
    Pattern,
    check_group_scores,
    check_pattern,
    groups_of,
)
from mfac_jax.pruning._patterns import Unstructured
from mfac_jax.rows import BlockRun, Partition, partition


@dataclass(frozen=True)
class Scope:
    """What may be pruned and in which pattern; shared by :func:`prune` and :func:`prune_step`.

    Attributes:
        path_filter: which leaves may be pruned; see :func:`prunable`.
        pattern: which weights can only go together; a :class:`Pattern` of the library or your
            own.
        budget: how one number ``sparsity`` is spread over the leaves. ``"global"`` holds it over
            all leaves together. ``"uniform"`` holds it in each leaf. ``"erk"`` spreads it by the
            Erdos-Renyi kernel. A function ``(sparsity, shapes) -> sparsities`` returns one
            number for each prunable leaf; their mean over all weights is ``sparsity``.
        costs: a tree of positive ints like the parameters: the cost of a weight in each leaf,
            for example in multiplications. Sparsity is then the pruned fraction of the cost,
            and weights are ranked by score over cost. Costs need the global budget.
        allow_empty_layers: whether a leaf may lose all of its weights.
        output_axis: the axis of the outputs in leaves of several axes: -1 in Flax, 0 in PyTorch
            and Equinox.

    Raises:
        TypeError: an attribute has another type, or the pattern is not hashable.
        ValueError: the expression of ``path_filter`` is malformed, no budget has this name, costs
            have another budget than ``"global"``, or a member of the pattern is out of range.
    """

    path_filter: PathFilter = None
    pattern: Pattern = Unstructured()  # noqa: RUF009  (immutable)
    budget: Budget = "global"
    costs: PyTree | None = None
    allow_empty_layers: bool = False
    output_axis: int = -1

    def __post_init__(self) -> None:
        as_filter(self.path_filter)
        check_pattern(self.pattern)
        as_budget(self.budget)
        if self.costs is not None and self.budget != "global":
            raise ValueError(f"costs need budget='global', got budget={self.budget!r}.")
        if not isinstance(self.allow_empty_layers, bool):
            raise TypeError(
                f"allow_empty_layers must be a bool, got {type(self.allow_empty_layers).__name__}."
            )
        _checks.axis(self.output_axis, "output_axis")


def check_scope(scope: object) -> None:
    """Checks that ``scope`` is a :class:`Scope`.

    Raises:
        TypeError: ``scope`` has another type.
    """
    if not isinstance(scope, Scope):
        raise TypeError(f"scope must be a Scope, got {type(scope).__name__}.")


@dataclass(frozen=True, eq=False)
class Selection:
    """The prunable leaves of given parameters, and the groups in them.

    Attributes:
        layout: all parameters.
        keep: for every leaf, whether it is prunable.
        pattern: which weights can only go together.
        groups: the groups of each prunable leaf.
    """

    layout: Layout
    keep: tuple[bool, ...]
    pattern: Pattern
    groups: tuple[Groups, ...]

    @functools.cached_property
    def names(self) -> list[str]:
        """The paths of the prunable leaves."""
        return [path for path, kept in zip(self.layout.paths, self.keep, strict=True) if kept]

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the prunable leaves."""
        return [shape for shape, kept in zip(self.layout.shapes, self.keep, strict=True) if kept]

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of weights of each prunable leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_weights(self) -> int:
        """The number of weights of all prunable leaves together."""
        return sum(self.sizes)

    @functools.cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """The number of weights of a group in each prunable leaf."""
        return tuple(groups.size for groups in self.groups)

    @property
    def has_groups(self) -> bool:
        """Whether any group has several weights."""
        return any(size != 1 for size in self.group_sizes)

    def leaves(self, tree: PyTree) -> tuple[Array, ...]:
        """The prunable leaves of a tree like the parameters."""
        pairs = zip(jax.tree.leaves(tree), self.keep, strict=True)
        return tuple(jnp.asarray(leaf) for leaf, kept in pairs if kept)

    def leaf_values(self, tree: PyTree) -> list[Any]:
        """The values of a tree at the prunable leaves, unconverted."""
        pairs = zip(jax.tree.leaves(tree), self.keep, strict=True)
        return [value for value, kept in pairs if kept]

    def tree(self, leaves: Sequence[Array], others: PyTree) -> PyTree:
        """A tree like the parameters: ``leaves`` where prunable, ``others`` elsewhere."""
        new = iter(leaves)
        pairs = zip(jax.tree.leaves(others), self.keep, strict=True)
        whole = [next(new) if kept else leaf for leaf, kept in pairs]
        return jax.tree.unflatten(self.layout.treedef, whole)

    def mask(self, leaves: Sequence[Array]) -> PyTree:
        """A mask of all parameters: ``leaves`` where prunable, false elsewhere."""
        return self.tree(leaves, self.empty_mask)

    @functools.cached_property
    def empty_mask(self) -> PyTree:
        """The mask of all parameters that is false everywhere."""
        leaves = [jax.device_put(np.zeros(shape, bool)) for shape in self.layout.shapes]
        return jax.tree.unflatten(self.layout.treedef, leaves)

    @functools.cached_property
    def starts(self) -> Int[np.ndarray, " layers"]:
        """The first coordinate of each prunable leaf."""
        sizes = np.asarray(self.layout.sizes, int)
        return (np.cumsum(sizes) - sizes)[np.asarray(self.keep, bool)]

    @functools.cached_property
    def order(self) -> Int[np.ndarray, " weights"]:
        """The coordinates of all prunable weights, leaf by leaf and group after group."""
        parts = [
            start + (np.arange(size) if groups.order is None else groups.order)
            for start, size, groups in zip(self.starts, self.sizes, self.groups, strict=True)
        ]
        return np.concatenate([*parts, np.zeros(0, int)]).astype(np.int32)

    @functools.cached_property
    def device_order(self) -> Int[Array, " weights"]:
        """:attr:`order` on the device."""
        return jax.device_put(self.order)

    @functools.cached_property
    def leaf_orders(self) -> tuple[Int[Array, " k"] | None, ...]:
        """The places of the weights in each prunable leaf, group after group."""
        return tuple(
            None if groups.order is None else jax.device_put(groups.order) for groups in self.groups
        )

    def partition_into_groups(self, leaf: int | None = None) -> Partition:
        """The groups of all leaves, or of one leaf, as blocks of coordinates."""
        chosen = range(len(self.sizes)) if leaf is None else [leaf]
        firsts = np.cumsum((0, *self.sizes)).tolist()
        order = self.order if leaf is None else self.order[firsts[leaf] : firsts[leaf + 1]]
        shift = 0 if leaf is None else firsts[leaf]
        runs = tuple(
            BlockRun(firsts[i] - shift, self.sizes[i] // self.group_sizes[i], self.group_sizes[i])
            for i in chosen
            if self.sizes[i]
        )
        return Partition(jax.device_put(order), runs)

    def mask_of_leaf(self, mask: PyTree, leaf: int) -> PyTree:
        """``mask`` on one prunable leaf, false in all other leaves."""
        place = [i for i, kept in enumerate(self.keep) if kept][leaf]
        leaves = jax.tree.leaves(self.empty_mask)
        leaves[place] = jax.tree.leaves(mask)[place]
        return jax.tree.unflatten(self.layout.treedef, leaves)

    def combine(self, scores: PyTree, alive: PyTree) -> PyTree:
        """Scores of groups from scores of single weights; both are trees like the parameters."""
        if not self.has_groups:
            return scores
        combined = _combine(
            self.leaves(scores),
            self.leaves(alive),
            self.leaf_orders,
            pattern=self.pattern,
            sizes=self.group_sizes,
        )
        return self.tree(combined, scores)


def select(scope: Scope, params: PyTree) -> Selection:
    """A scope on given parameters.

    Raises:
        TypeError: a leaf is not real floating point, the filter does not return a bool, or the
            pattern does not return :class:`Groups`.
        ValueError: the filter selects nothing, the pattern does not fit a leaf, or there are too
            many parameters.
    """
    layout = Layout(params)
    partition(layout, None)  # which numbers the coordinates
    keep = tuple(bool(flag) for flag in jax.tree.leaves(prunable(params, scope.path_filter)))
    groups = tuple(
        groups_of(scope.pattern, shape, scope.output_axis, name)
        for shape, name, kept in zip(layout.shapes, layout.paths, keep, strict=True)
        if kept
    )
    return Selection(layout, keep, scope.pattern, groups)


def in_groups(leaf: Array, order: Int[Array, " k"] | None, size: int) -> Array:
    """The weights of a leaf, one group in each row."""
    flat = leaf.reshape(-1)
    return (flat if order is None else flat[order]).reshape(-1, max(size, 1))


def as_leaf(groups: Array, order: Int[Array, " k"] | None, shape: tuple[int, ...]) -> Array:
    """Inverse of :func:`in_groups`."""
    flat = groups.reshape(-1)
    if order is not None:
        flat = jnp.zeros_like(flat).at[order].set(flat, unique_indices=True)
    return flat.reshape(shape)


@functools.partial(jax.jit, static_argnames=("pattern", "sizes"))
def _combine(
    scores: tuple[Array, ...],
    alive: tuple[Array, ...],
    orders: tuple[Array | None, ...],
    *,
    pattern: Pattern,
    sizes: tuple[int, ...],
) -> list[Array]:
    out = []
    for leaf, here, order, size in zip(scores, alive, orders, sizes, strict=True):
        if not leaf.size:
            out.append(leaf)
            continue
        weights = in_groups(leaf, order, size)
        found = pattern.combine(weights, in_groups(here, order, size))
        found = check_group_scores(found, weights, "combine", pattern)
        out.append(as_leaf(found, order, leaf.shape))
    return out
