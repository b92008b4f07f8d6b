"""Budgets: how one number ``sparsity`` is spread over the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mfac_jax import _checks

Shapes = Sequence[tuple[int, ...]]
BudgetFn = Callable[[float, Shapes], Sequence[float]]
Budget = str | BudgetFn


def uniform(sparsity: float, shapes: Shapes) -> Sequence[float]:
    """The same sparsity in every layer."""
    return [sparsity] * len(shapes)


def erdos_renyi_kernel(sparsity: float, shapes: Shapes) -> Sequence[float]:
    """Densities in proportion to ``sum(shape) / prod(shape)``, none above 1.

    Small layers stay denser.

    Reference: Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery", ICML 2020, section 3.
    """
    density = 1 - sparsity
    sizes = np.asarray([math.prod(shape) for shape in shapes], float)
    weight = np.asarray([sum(shape) / max(math.prod(shape), 1) for shape in shapes])
    full = np.zeros(len(sizes), bool)
    while True:
        room = density * sizes.sum() - sizes[full].sum()
        scale = room / max((weight * sizes)[~full].sum(), np.finfo(float).tiny)
        above = ~full & (scale * weight > 1)
        if not above.any():
            return (1 - np.where(full, 1.0, scale * weight)).tolist()
        full |= above


# The global budget sets no number for a single layer.
BUDGETS: dict[str, BudgetFn | None] = {
    "global": None,
    "uniform": uniform,
    "erk": erdos_renyi_kernel,
}


def as_budget(budget: Budget) -> BudgetFn | None:
    """The built-in budget of a name, or the caller's own function; None for the global budget.

    Raises:
        TypeError: ``budget`` is neither a name nor a function.
        ValueError: no budget has this name.
    """
    return _checks.named(budget, "budget", BUDGETS)


def fractions_of(
    budget: BudgetFn, sparsity: float, shapes: Shapes, names: Sequence[str]
) -> list[float]:
    """The sparsity of each layer.

    Args:
        budget: the budget.
        sparsity: the sparsity of all layers together.
        shapes: the shapes of the layers.
        names: their paths, for errors.

    Raises:
        TypeError: the budget does not return a sequence of numbers.
        ValueError: it returns another number of numbers, or a number outside [0, 1].
    """
    found: Any = budget(sparsity, shapes)
    is_list = isinstance(found, Sequence) and not isinstance(found, str)
    is_array = isinstance(found, np.ndarray | jax.Array) and found.ndim == 1
    if not (is_list or is_array):
        raise TypeError(
            f"budget must return a sequence of numbers, one for each of {len(shapes)} layers, "
            f"got {found!r}."
        )
    if len(found) != len(shapes):
        raise ValueError(
            f"budget must return a number for each of {len(shapes)} layers, got {len(found)}."
        )
    for fraction, name in zip(found, names, strict=True):
        _checks.unit_interval(fraction, f"the sparsity that budget gives to params{name}")
    return [float(fraction) for fraction in found]
