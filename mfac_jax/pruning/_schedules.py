"""Schedules: the sparsity after each of several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.pruning._masks import pruned_of_leaves

SCHEDULES = ("geometric", "cubic", "linear")


def sparsity_schedule(
    final: float, steps: int, *, kind: str = "geometric", initial: float = 0.0
) -> tuple[float, ...]:
    """The sparsity after each of ``steps`` pruning steps, from ``initial`` to ``final``.

    Args:
        final: the sparsity in the end, in [0, 1]; 1 in one step, or in other kinds than
            ``"geometric"``, which would get there at once.
        steps: how many steps there are.
        kind:
            - ``"geometric"``: every step leaves the same fraction of what is alive, as in the
              paper's recomputations: ``1 - s_t = (1 - s_0) ((1 - s_T) / (1 - s_0))^(t/T)``;
            - ``"cubic"``: ``s_T + (s_0 - s_T) (1 - t/T)^3``, fast at first (Zhu, Gupta, "To
              prune, or not to prune", 2017), usual in gradual pruning;
            - ``"linear"``: the same number of weights in every step.
        initial: the sparsity before the first step.

    Returns:
        The sparsities; the last is ``final`` exactly.

    Raises:
        ValueError: a sparsity lies outside [0, 1], they fall, ``kind`` is unknown, or a geometric
            schedule of several steps would end at 1.
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
    schedule: str | Sequence[float],
    steps: int,
    mask: Sequence[Array],
    keep: Sequence[bool],
    costs: PyTree | None,
) -> list[Any]:
    """The sparsity after each step of :func:`mfac_jax.pruning.prune`: numbers, or trees of them.

    Args:
        sparsity: in the end; well-formed.
        schedule: a kind, or the sparsities after each step.
        steps: how many, if it is a kind.
        mask: the leaves of the mask so far.
        keep: which leaves are prunable.
        costs: of a weight of each leaf.

    Raises:
        ValueError: as :func:`sparsity_schedule`, or a schedule that is given does not rise to
            ``sparsity``.
    """
    is_number = jax.tree_util.all_leaves([sparsity])
    if not isinstance(schedule, str | Sequence | np.ndarray | jax.Array):
        raise TypeError(
            "schedule must be the name of one, or the sparsities after each step, "
            f"got {type(schedule).__name__}."
        )
    if not isinstance(schedule, str):
        given = [float(s) for s in schedule]
        if not given or given != sorted(given) or given[-1] <= 0:
            raise ValueError(f"schedule must be sparsities that rise, got {schedule!r}.")
        if is_number and not np.isclose(given[-1], float(sparsity), rtol=1e-6, atol=0):
            raise ValueError(
                f"schedule must end at sparsity={sparsity}, got {given[-1]} as its last entry."
            )
        if is_number:
            return [*given[:-1], float(sparsity)]
        return [jax.tree.map(lambda leaf, part=s / given[-1]: leaf * part, sparsity) for s in given]
    counts = iter(pruned_of_leaves([leaf for leaf, kept in zip(mask, keep, strict=True) if kept]))
    pruned = [next(counts) if kept else 0 for kept in keep]
    if is_number:
        weights = jax.tree.leaves(costs) if costs is not None else [1] * len(mask)
        counted = [
            (cost * gone, cost * leaf.size)
            for cost, gone, leaf, kept in zip(weights, pruned, mask, keep, strict=True)
            if kept and leaf.size
        ]
        start = sum(gone for gone, _ in counted) / max(sum(size for _, size in counted), 1)
        start = min(start, float(sparsity))
        return list(sparsity_schedule(float(sparsity), steps, kind=schedule, initial=start))
    leaves, treedef = jax.tree.flatten(sparsity)
    columns = [
        sparsity_schedule(
            float(leaf), steps, kind=schedule, initial=min(gone / max(m.size, 1), float(leaf))
        )
        for leaf, gone, m in zip(leaves, pruned, mask, strict=True)
    ]
    return [jax.tree.unflatten(treedef, row) for row in zip(*columns, strict=True)]
