"""How many weights a step prunes, in all layers together or in each layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.pruning._budgets import BudgetFn, as_budget, fractions_of
from mfac_jax.pruning._masks import MOST_WEIGHTS, pruned_count, pruned_of_leaves
from mfac_jax.pruning._scope import Scope, Selection


class Target(NamedTuple):
    """How much is pruned after a step.

    Attributes:
        counts: the number of pruned weights, or their total cost; one number for all prunable
            leaves together, or one for each leaf.
        costs: the cost of a weight in each prunable leaf.
    """

    counts: Int[Array, "*layers"]
    costs: tuple[int, ...]


def check_wanted(sparsity: ArrayLike | PyTree, scope: Scope, selection: Selection) -> None:
    """Checks sparsity and costs, as far as possible without a mask.

    Raises:
        TypeError: a value is not a number.
        ValueError: a number lies outside its range, a tree does not fit, or costs and a tree of
            sparsities are given together.
    """
    fractions = _fractions(sparsity, selection)
    _costs(scope, selection, fractions is None)
    if fractions is None:
        _checks.unit_interval(sparsity, "sparsity")


@dataclass(frozen=True, eq=False)
class Start:
    """The mask before the first step. Each property is read from the device once.

    Attributes:
        selection: the prunable weights and their groups.
        mask: which weights of the prunable leaves are alive.
    """

    selection: Selection
    mask: Sequence[Array]

    @property
    def is_known(self) -> bool:
        """Whether the mask is not traced."""
        return not any(isinstance(leaf, jax.core.Tracer) for leaf in self.mask)

    @functools.cached_property
    def pruned(self) -> list[int]:
        """The number of pruned weights of each prunable leaf."""
        return pruned_of_leaves(self.mask)

    @functools.cached_property
    def torn(self) -> dict[str, int]:
        """The leaves with groups that are pruned in part, and the number of these groups."""
        selection, found = self.selection, {}
        for leaf, name, groups in zip(self.mask, selection.names, selection.groups, strict=True):
            if groups.size <= 1 or not leaf.size:
                continue
            # NumPy computes immediately, even while a caller is traced.
            flat = np.asarray(leaf).reshape(-1)
            rows = (flat if groups.order is None else flat[groups.order]).reshape(-1, groups.size)
            torn = int(np.sum(rows.any(axis=1) & ~rows.all(axis=1)))
            if torn:
                found[name] = torn
        return found


def target_of(
    sparsity: ArrayLike | PyTree, scope: Scope, selection: Selection, mask: Sequence[Array]
) -> Target:
    """How much is pruned after a single step; see :func:`target_from`."""
    return target_from(Start(selection, mask), sparsity, scope)


def target_from(
    start: Start, sparsity: ArrayLike | PyTree, scope: Scope, *, is_last: bool = True
) -> Target:
    """How much is pruned after a step; see :func:`mfac_jax.pruning.prune_step`.

    Args:
        start: the mask before the first step.
        sparsity: one number, or a tree like all parameters.
        scope: the budget, the costs, and whether layers may vanish.
        is_last: whether this is the last step. Before the last step, a leaf may already have
            more pruned weights than its budget; it then loses no more.

    Returns:
        The target. It can be met, and it is not below what is pruned already.

    Raises:
        TypeError: as :func:`check_wanted`, or ``sparsity`` is traced and must be known.
        ValueError: as :func:`check_wanted`, or the target cannot be met.
    """
    selection = start.selection
    check_wanted(sparsity, scope, selection)
    fractions = _fractions(sparsity, selection)
    costs = _costs(scope, selection, fractions is None)
    total = sum(cost * size for cost, size in zip(costs, selection.sizes, strict=True))
    if total > MOST_WEIGHTS:
        raise ValueError(
            f"costs must add up to at most {MOST_WEIGHTS}, got {total}; take smaller units."
        )
    known = fractions is not None or not isinstance(sparsity, jax.core.Tracer)
    budget = as_budget(scope.budget)
    counts: Any
    if fractions is not None:
        pairs = zip(fractions, selection.sizes, strict=True)
        counts = np.asarray([round(f * size) for f, size in pairs], np.int32)
    elif budget is not None:
        if not known:
            raise TypeError(f"sparsity must be known outside jit for budget={scope.budget!r}.")
        counts = layer_counts(sparsity, budget, selection)
    elif known:
        counts = np.asarray(round(float(np.asarray(sparsity)) * total), np.int32)
    else:
        counts = pruned_count(sparsity, total)
    if not is_last and np.ndim(counts):
        counts = np.maximum(counts, start.pruned).astype(np.int32)
    if known:
        target = _KnownTarget(counts, costs, sparsity, selection)
        if start.is_known:
            target.check_possible(start)
        if not scope.allow_empty_layers:
            target.check_layers_stay()
        counts = jax.device_put(counts.astype(np.int32))  # which compiles nothing
    return Target(counts, costs)


def _fractions(sparsity: ArrayLike | PyTree, selection: Selection) -> list[float] | None:
    """The numbers of the prunable leaves, if ``sparsity`` is a tree of them."""
    layout = selection.layout
    if sparsity is None or jax.tree_util.all_leaves([sparsity]):
        return None
    chosen = []
    fractions = layout.leaves(sparsity, "sparsity is no number and")
    leaves = zip(layout.paths, selection.keep, fractions, strict=True)
    for path, kept, fraction in leaves:
        _checks.unit_interval(fraction, f"sparsity{path}")
        if not kept and fraction != 0:
            raise ValueError(
                f"sparsity{path} must be 0, because this leaf is not pruned; got {fraction}."
            )
        if kept:
            chosen.append(float(fraction))
    return chosen


def _costs(scope: Scope, selection: Selection, is_number: bool) -> tuple[int, ...]:
    layout, costs = selection.layout, scope.costs
    if costs is None:
        return (1,) * len(selection.sizes)
    if not is_number:
        raise ValueError("costs need one number as sparsity, got a tree of numbers.")
    pairs = zip(layout.paths, selection.keep, layout.leaves(costs, "costs"), strict=True)
    chosen = [_checks.positive_int(cost, f"costs{path}") for path, kept, cost in pairs if kept]
    unit = math.gcd(*chosen)
    return tuple(cost // unit for cost in chosen)


def layer_counts(
    sparsity: Any, budget: BudgetFn, selection: Selection
) -> Int[np.ndarray, " layers"]:
    """How many weights a budget for layers prunes in each prunable leaf.

    Counts are rounded so that they add up to ``round(sparsity * d)``.

    Raises:
        TypeError: the budget does not return a sequence of numbers.
        ValueError: a number lies outside [0, 1], or the budget does not spend ``sparsity``.
    """
    sizes = np.asarray(selection.sizes, float)
    total = round(float(sparsity) * selection.num_weights)
    share = total / max(selection.num_weights, 1)
    fractions = fractions_of(budget, share, selection.shapes, selection.names)
    wanted = np.asarray(fractions, float) * sizes
    if abs(wanted.sum() - total) > 0.5 + 1e-6 * total:
        raise ValueError(
            f"budget must spend the whole sparsity: expected {total} pruned weights in all "
            f"layers, got {wanted.sum():.1f}."
        )
    return _rounded(wanted, sizes, total)


def _rounded(wanted: np.ndarray, sizes: np.ndarray, total: int) -> Int[np.ndarray, " layers"]:
    """Whole numbers near ``wanted``, at most ``sizes``, that add up to ``total``.

    The largest remainders round up first.
    """
    counts = np.minimum(np.floor(wanted + 1e-9), sizes).astype(np.int64)
    while (missing := total - counts.sum()) != 0:
        step = 1 if missing > 0 else -1
        movable = counts < sizes if step > 0 else counts > 0
        places = np.flatnonzero(movable)
        nearest = places[np.argsort(step * (counts - wanted)[places], kind="stable")]
        counts[nearest[: abs(missing)]] += step
    return counts.astype(np.int32)


@dataclass(frozen=True)
class _KnownTarget:
    """Checks a target whose numbers are known.

    Attributes:
        counts: see :class:`Target`.
        costs: see :class:`Target`.
        sparsity: the caller's argument, for messages.
        selection: the prunable weights and their groups.
    """

    counts: Int[np.ndarray, "*layers"]
    costs: tuple[int, ...]
    sparsity: Any
    selection: Selection

    def check_possible(self, start: Start) -> None:
        """Checks that no weight must be revived, and that the pattern can prune this much."""
        already = np.asarray(start.pruned)
        if self.selection.pattern.prunes_whole_groups:
            for name, torn in start.torn.items():
                raise ValueError(
                    f"{self.selection.pattern} prunes whole groups, but {torn} groups of "
                    f"params{name} are pruned in part already."
                )
        counts, sizes = self.counts, np.asarray(self.selection.sizes)
        most = np.round(sizes * self.selection.pattern.removable).astype(int)
        where, columns = (
            [f" of params{name}" for name in self.selection.names],
            [counts, already, most, sizes],
        )
        if not counts.ndim:
            cost = np.asarray(self.costs)
            in_all = [(cost * column).sum(keepdims=True) for column in columns[1:]]
            where, columns = [""], [counts[None], *in_all]
        rows = np.stack(columns, axis=1).tolist()
        unit = "weights" if set(self.costs) <= {1} else "units of cost"
        for here, (count, least, largest, total) in zip(where, rows, strict=True):
            if count < least:
                raise ValueError(
                    "sparsity must not lie below what is pruned already, since pruned weights stay "
                    f"pruned: expected at least {least} of {total} {unit}{here}, "
                    f"got sparsity={self.sparsity} ({count} {unit})."
                )
            if count > largest:
                raise ValueError(
                    f"{self.selection.pattern} prunes at most {largest} of {total} {unit}{here}, "
                    f"got sparsity={self.sparsity} ({count} {unit})."
                )

    def check_layers_stay(self) -> None:
        """Checks that no leaf loses all of its weights. In an N:M pattern no leaf can."""
        if not self.selection.pattern.prunes_whole_groups:
            return
        sizes = np.asarray(self.selection.sizes)
        most = np.maximum(sizes - np.asarray(self.selection.group_sizes), 0)
        if self.counts.ndim:
            over = [i for i, size in enumerate(sizes) if size and self.counts[i] > most[i]]
            where = "".join(f" params{self.selection.names[i]}" for i in over[:1])
        else:
            over = [0] * bool(self.counts > (np.asarray(self.costs) * most).sum())
            where = " a layer"
        if over:
            raise ValueError(
                f"sparsity={self.sparsity} would leave{where} without weights. "
                "Set allow_empty_layers=True to let layers vanish."
            )
