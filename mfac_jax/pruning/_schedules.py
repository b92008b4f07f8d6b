"""Schedules: the sparsity after each of several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.pruning._scope import Scope
from mfac_jax.pruning._targets import Start

SCHEDULES = ("geometric", "cubic", "linear")


def sparsity_schedule(
    final: float, steps: int, *, kind: str = "geometric", initial: float = 0.0
) -> tuple[float, ...]:
    """The sparsity after each of ``steps`` pruning steps, from ``initial`` to ``final``.

    Args:
        final: the sparsity after the last step, in [0, 1]. A geometric schedule of several
            steps cannot reach 1.
        steps: the number of steps.
        kind: the shape of the schedule.

            - ``"geometric"``: every step keeps the same fraction of the alive weights, as in the
              paper's recomputations: ``1 - s_t = (1 - s_0) ((1 - s_T) / (1 - s_0))^(t/T)``;
            - ``"cubic"``: ``s_T + (s_0 - s_T) (1 - t/T)^3``, fast at first and common in gradual
              pruning (Zhu, Gupta, "To prune, or not to prune", 2017);
            - ``"linear"``: every step prunes the same number of weights.
        initial: the sparsity before the first step.

    Returns:
        The sparsities; the last is ``final`` exactly.

    Raises:
        ValueError: a sparsity lies outside [0, 1], ``final`` is below ``initial``, ``kind`` is
            unknown, or a geometric schedule of several steps would end at 1.
        TypeError: ``steps`` is not an int, or a sparsity is not a number.

    Example:
        >>> from mfac_jax.pruning import sparsity_schedule
        >>> [round(s, 3) for s in sparsity_schedule(0.875, 3)]
        [0.5, 0.75, 0.875]
    """
    _checks.positive_int(steps, "steps")
    _checks.one_of(kind, "kind", SCHEDULES)
    _checks.unit_interval(initial, "initial")
    _checks.unit_interval(final, "final")
    if not initial <= final:
        raise ValueError(f"final must be at least initial={initial}, got {final}.")
    if kind == "geometric" and final == 1 and initial < 1 and steps > 1:
        raise ValueError(
            "a geometric schedule leaves the same fraction in every step and ends below sparsity "
            "1: expected 'cubic' or 'linear' for a sparsity of 1, or one step."
        )

    def after(step: int) -> float:
        part = step / steps
        if step == steps or initial == final:
            return float(final)
        if kind == "linear":
            return initial + (final - initial) * part
        if kind == "cubic":
            return final + (initial - final) * (1 - part) ** 3
        return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** part

    return tuple(after(step) for step in range(1, steps + 1))


def schedule_of(
    sparsity: float | PyTree,
    steps: Any,
    scope: Scope,
    before: Start,
) -> list[Any]:
    """The sparsity after each step of :func:`mfac_jax.pruning.prune`: numbers, or trees of them.

    Args:
        sparsity: the sparsity after the last step; already checked.
        steps: the number of steps of a geometric schedule; or the sparsity after each step.
        scope: the cost of a weight of each leaf.
        before: the mask before the first step.

    Raises:
        TypeError: ``steps`` is neither a number nor a sequence.
        ValueError: as :func:`sparsity_schedule`, or the given sparsities do not rise to
            ``sparsity``.
    """
    is_number = jax.tree_util.all_leaves([sparsity])
    is_count = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    is_list = isinstance(steps, Sequence) and not isinstance(steps, str)
    is_array = isinstance(steps, np.ndarray | jax.Array) and steps.ndim == 1
    if not (is_count or is_list or is_array):
        raise TypeError(
            "steps must be a number of steps, or the sparsities after each step, such as "
            f"sparsity_schedule(0.9, 8, kind='cubic'); got {steps!r}."
        )
    if not is_count:
        return _given_schedule(sparsity, steps, is_number=is_number)
    selection, pruned = before.selection, before.pruned
    if is_number:
        costs = [1] * len(pruned) if scope.costs is None else selection.leaf_values(scope.costs)
        spent = sum(cost * count for cost, count in zip(costs, pruned, strict=True))
        total = sum(cost * size for cost, size in zip(costs, selection.sizes, strict=True))
        start = min(spent / max(total, 1), float(sparsity))
        return list(sparsity_schedule(float(sparsity), steps, initial=start))
    starts = dict(zip(selection.names, pruned, strict=True))
    columns = []
    for path, size, leaf in zip(
        selection.layout.paths, selection.layout.sizes, jax.tree.leaves(sparsity), strict=True
    ):
        start = min(starts.get(path, 0) / max(size, 1), float(leaf))
        columns.append(sparsity_schedule(float(leaf), steps, initial=start))
    treedef = jax.tree.structure(sparsity)
    return [jax.tree.unflatten(treedef, row) for row in zip(*columns, strict=True)]


def _given_schedule(sparsity: float | PyTree, schedule: Any, *, is_number: bool) -> list[Any]:
    given = [float(s) for s in schedule]
    if not given or given != sorted(given) or given[-1] <= 0:
        raise ValueError(f"steps must be sparsities that rise, got {schedule!r}.")
    if is_number and not np.isclose(given[-1], float(sparsity), rtol=1e-6, atol=0):
        raise ValueError(
            f"steps must end at sparsity={sparsity}, got {given[-1]} as its last entry."
        )
    if is_number:
        return [*given[:-1], float(sparsity)]
    return [jax.tree.map(lambda leaf, part=s / given[-1]: leaf * part, sparsity) for s in given]
