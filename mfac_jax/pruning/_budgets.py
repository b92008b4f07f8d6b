"""Budgets: how many weights go, in all or in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree
from mfac_jax.pruning._masks import MOST_WEIGHTS, pruned_count, pruned_of_leaves
from mfac_jax.pruning._patterns import Grouping, NofM

BUDGETS = ("global", "uniform", "erk")


class Target(NamedTuple):
    """What is to be pruned in the end.

    Attributes:
        counts: of weights, or of what they cost; in all, or in each leaf.
        costs: what a weight of each leaf counts for.
    """

    counts: Int[Array, "*layers"]
    costs: tuple[int, ...]


def check_wanted(
    sparsity: ArrayLike | PyTree,
    budget: str,
    costs: PyTree | None,
    layout: Layout,
    keep: Sequence[bool],
) -> None:
    """Sparsity, budget and costs are such as :func:`target_of` takes.

    Raises:
        TypeError: a number is none.
        ValueError: one lies outside its range, a tree does not fit, or they do not go together.
    """
    _checks.one_of(budget, "budget", BUDGETS)
    fractions = _fractions(sparsity, layout, keep)
    _costs(costs, layout, keep, budget, fractions is None)
    if fractions is None:
        _checks.unit_interval(sparsity, "sparsity")


def target_of(
    sparsity: ArrayLike | PyTree,
    budget: str,
    selected: Layout,
    grouping: Grouping,
    *,
    layout: Layout,
    keep: Sequence[bool],
    costs: PyTree | None,
    allow_empty_layers: bool,
    mask: Sequence[Array],
    is_last: bool = True,
) -> Target:
    """How much is to be pruned in the end; see :func:`mfac_jax.pruning.prune_step`.

    Args:
        sparsity: one number, or a tree like all parameters.
        budget: where one number holds.
        selected: the prunable parameters.
        grouping: their groups.
        layout: all parameters.
        keep: which of them are prunable.
        costs: of a weight of each leaf, a tree like all parameters.
        allow_empty_layers: whether a leaf may lose all of its weights.
        mask: what of the prunable parameters is alive so far.
        is_last: whether more is to be pruned later. A leaf of which more is pruned than it
            is to be by now then waits for the others.

    Returns:
        The target, possible and not below what is pruned already.

    Raises:
        TypeError: a number is none, or is traced where it must be known.
        ValueError: the target cannot be met.
    """
    _checks.one_of(budget, "budget", BUDGETS)
    fractions = _fractions(sparsity, layout, keep)
    weigh = _costs(costs, layout, keep, budget, fractions is None)
    total = sum(cost * size for cost, size in zip(weigh, selected.sizes, strict=True))
    if total > MOST_WEIGHTS:
        raise ValueError(
            f"costs must add up to at most {MOST_WEIGHTS}, got {total}; take smaller units."
        )
    names = [path for path, kept in zip(layout.paths, keep, strict=True) if kept]
    known = fractions is not None or not isinstance(sparsity, jax.core.Tracer)
    counts: Any
    if fractions is not None:
        pairs = zip(fractions, selected.sizes, strict=True)
        counts = np.asarray([round(f * size) for f, size in pairs], np.int32)
    elif budget != "global":
        counts = layer_counts(sparsity, budget, selected)
    elif known:
        _checks.unit_interval(sparsity, "sparsity")
        counts = np.asarray(round(float(np.asarray(sparsity)) * total), np.int32)
    else:
        counts = pruned_count(sparsity, total)
    if not is_last and np.ndim(counts):
        counts = np.maximum(counts, pruned_of_leaves(mask)).astype(np.int32)
    if known:
        wanted = _Wanted(counts, weigh, sparsity, selected, names, grouping)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in mask):
            wanted.check_possible(mask)
        if not allow_empty_layers:
            wanted.check_layers_stay()
    if isinstance(counts, np.ndarray):
        counts = jax.device_put(counts.astype(np.int32))  # which compiles nothing
    return Target(counts, weigh)


def _fractions(
    sparsity: ArrayLike | PyTree, layout: Layout, keep: Sequence[bool]
) -> list[float] | None:
    """The numbers of the prunable leaves, if ``sparsity`` is a tree of them."""
    if sparsity is None or jax.tree_util.all_leaves([sparsity]):
        return None
    if jax.tree.structure(sparsity) != layout.treedef:
        raise ValueError(
            "sparsity must be a number, or a tree of numbers with the structure of the "
            f"parameters: expected {layout.treedef}, got {jax.tree.structure(sparsity)}."
        )
    chosen = []
    for path, kept, fraction in zip(layout.paths, keep, jax.tree.leaves(sparsity), strict=True):
        _checks.unit_interval(fraction, f"sparsity{path}")
        if not kept and fraction != 0:
            raise ValueError(f"sparsity{path} must be 0, for it is not pruned; got {fraction}.")
        if kept:
            chosen.append(float(fraction))
    return chosen


def _costs(
    costs: PyTree | None, layout: Layout, keep: Sequence[bool], budget: str, is_number: bool
) -> tuple[int, ...]:
    if costs is None:
        return (1,) * sum(keep)
    if budget != "global" or not is_number:
        raise ValueError("costs go with one sparsity and budget='global'.")
    if jax.tree.structure(costs) != layout.treedef:
        raise ValueError(
            "costs must have the structure of the parameters: "
            f"expected {layout.treedef}, got {jax.tree.structure(costs)}."
        )
    pairs = zip(layout.paths, keep, jax.tree.leaves(costs), strict=True)
    chosen = [_checks.positive_int(cost, f"costs{path}") for path, kept, cost in pairs if kept]
    unit = math.gcd(*chosen)
    return tuple(cost // unit for cost in chosen)


def layer_counts(sparsity: Any, budget: str, layout: Layout) -> Int[np.ndarray, " layers"]:
    """How many weights of each leaf are pruned after a step.

    - ``"uniform"``: the same fraction of every leaf;
    - ``"erk"``: densities in proportion to the sum of a leaf's axes over their product, the
      Erdos-Renyi kernel, none above 1: small layers stay denser.

    Counts a leaf are rounded so that they add up to ``round(sparsity * d)``.

    Reference: Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery", ICML 2020, section 3.

    Raises:
        TypeError: ``sparsity`` is not a number; a traced one has no count a leaf.
        ValueError: a fraction lies outside [0, 1].
    """
    _checks.unit_interval(sparsity, "sparsity")
    if isinstance(sparsity, jax.core.Tracer):
        raise TypeError(f"sparsity must be known outside jit for budget={budget!r}.")
    total = round(float(sparsity) * layout.size)
    sizes = np.asarray(layout.sizes, float)
    density = 1 - total / max(layout.size, 1)
    densities = np.full(len(sizes), density)
    if budget == "erk":
        densities = _erdos_renyi(layout, density)
    return _rounded((1 - densities) * sizes, total)


def _erdos_renyi(layout: Layout, density: float) -> np.ndarray:
    """Densities in proportion to ``sum(shape) / prod(shape)``, none above 1."""
    sizes = np.asarray(layout.sizes, float)
    weight = np.asarray([sum(shape) / max(math.prod(shape), 1) for shape in layout.shapes])
    full = np.zeros(len(sizes), bool)
    while True:
        room = density * sizes.sum() - sizes[full].sum()
        scale = room / max((weight * sizes)[~full].sum(), np.finfo(float).tiny)
        above = ~full & (scale * weight > 1)
        if not above.any():
            return np.where(full, 1.0, scale * weight)
        full |= above


def _rounded(wanted: np.ndarray, total: int) -> Int[np.ndarray, " layers"]:
    """Whole numbers near ``wanted`` that add up to ``total``: the largest rests go up."""
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    rests = np.argsort(counts - wanted, kind="stable")
    counts[rests[: total - counts.sum()]] += 1
    return counts.astype(np.int32)


class _Wanted(NamedTuple):
    """A target that is checked.

    Attributes:
        counts: of weights, or of what they cost; in all, or in each leaf.
        costs: what a weight of each leaf counts for.
        sparsity: what the caller said, for messages.
        layout: the prunable parameters.
        names: what they are called, for messages.
        grouping: their groups.
    """

    counts: Int[np.ndarray, "*layers"]
    costs: tuple[int, ...]
    sparsity: Any
    layout: Layout
    names: Sequence[str]
    grouping: Grouping

    def check_possible(self, mask: Sequence[Array]) -> None:
        """It must not revive what is pruned, nor lie above what the pattern lets go."""
        already = np.asarray(pruned_of_leaves(mask))
        if self.grouping.goes_whole:
            self._check_whole_groups(mask)
        counts, sizes = self.counts, np.asarray(self.layout.sizes)
        most = np.round(sizes * self.grouping.most).astype(int)
        where, columns = (
            [f" of params{name}" for name in self.names],
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
                    f"{self.grouping.pattern} lets at most {largest} of {total} {unit}{here} go, "
                    f"got sparsity={self.sparsity} ({count} {unit})."
                )

    def _check_whole_groups(self, mask: Sequence[Array]) -> None:
        turned = [
            np.transpose(np.asarray(leaf), order)  # at once, also while a caller is traced
            for leaf, order in zip(mask, self.grouping.orders, strict=True)
        ]
        for leaf, name, size in zip(turned, self.names, self.grouping.sizes, strict=True):
            groups = leaf.reshape(-1, max(size, 1))
            torn = int(np.sum(groups.any(axis=1) & ~groups.all(axis=1)))
            if torn:
                raise ValueError(
                    f"{self.grouping.pattern} takes groups as a whole, but of {torn} groups of "
                    f"params{name} a part is pruned already."
                )

    def check_layers_stay(self) -> None:
        """No leaf may lose all of its weights (in an N:M pattern none can)."""
        if isinstance(self.grouping.pattern, NofM):
            return
        sizes = np.asarray(self.layout.sizes)
        most = np.maximum(sizes - np.asarray(self.grouping.sizes), 0)
        if self.counts.ndim:
            over = [i for i, size in enumerate(sizes) if size and self.counts[i] > most[i]]
            where = "".join(f" params{self.names[i]}" for i in over[:1])
        else:
            over = [0] * bool(self.counts > (np.asarray(self.costs) * most).sum())
            where = " a layer"
        if over:
            raise ValueError(
                f"sparsity={self.sparsity} would leave{where} without weights. "
                "Set allow_empty_layers=True to let layers vanish."
            )
