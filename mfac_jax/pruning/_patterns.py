"""Patterns: which weights can only go together.

A pattern cuts every leaf into *groups* of neighbouring weights. For the groups to be rows of
a matrix, a leaf is turned, its axes put into another order and made two: groups, and weights
of a group. What scores, masks and updates work on is turned so; unstructured pruning, where
each weight is a group of its own, leaves everything as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mfac_jax import _checks
from mfac_jax._layout import Layout


@dataclass(frozen=True)
class Unstructured:
    """Every weight on its own: the default."""


@dataclass(frozen=True)
class NofM:
    """At least ``m - n`` of every ``m`` neighbours are pruned in the end, at most so many ever.

    ``NofM(2, 4)`` is the 2:4 pattern of sparse matrix units.

    Attributes:
        n: weights that stay in each ``m``.
        m: neighbours that make a group.
        axis: the axis they are neighbours along. By default the last but one, that of the
            inputs in the kernels of Flax: products are summed along it.
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self) -> None:
        _checks.positive_int(self.n, "n")
        _checks.positive_int(self.m, "m")
        if self.n >= self.m:
            raise ValueError(f"n must be below m, got n={self.n}, m={self.m}.")
        _check_axis(self.axis)

    @property
    def removable(self) -> int:
        """Weights of a group that may go."""
        return self.m - self.n


@dataclass(frozen=True)
class BlocksOf:
    """``size`` neighbours go together.

    Attributes:
        size: neighbours that make a group.
        axis: the axis they are neighbours along; the last by default.
    """

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        _checks.positive_int(self.size, "size")
        _check_axis(self.axis)


@dataclass(frozen=True)
class Slices:
    """All weights with one index along an axis go together.

    ``Slices()`` prunes output channels (or neurons) of Flax kernels, ``Slices(axis=0)`` and
    ``Slices(axis=1)`` rows and columns of matrices.

    Attributes:
        axis: the axis; the last by default.
    """

    axis: int = -1

    def __post_init__(self) -> None:
        _check_axis(self.axis)


Pattern = Unstructured | NofM | BlocksOf | Slices


def check_pattern(pattern: object) -> None:
    """``pattern`` is one.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(pattern, Unstructured | NofM | BlocksOf | Slices):
        raise TypeError(
            "pattern must be one of Unstructured(), NofM(n, m), BlocksOf(size) and Slices(), "
            f"got {pattern!r}."
        )


class Grouping(NamedTuple):
    """A pattern on given leaves; hashable.

    Attributes:
        pattern: the pattern.
        sizes: the number of weights a group has in each leaf.
    """

    pattern: Pattern
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Weights of the largest group."""
        return max(self.sizes, default=1)

    @property
    def goes_whole(self) -> bool:
        """Whether the groups of several weights go as a whole."""
        return isinstance(self.pattern, BlocksOf | Slices)

    @property
    def most(self) -> float:
        """The largest fraction of the weights that may go."""
        pattern = self.pattern
        return pattern.removable / pattern.m if isinstance(pattern, NofM) else 1.0


def group(pattern: Pattern, layout: Layout, names: Sequence[str]) -> Grouping:
    """The groups that a pattern makes of the parameters (before they are turned).

    Args:
        pattern: the pattern.
        layout: the prunable parameters.
        names: what they are called, for messages.

    Returns:
        The groups.

    Raises:
        ValueError: the pattern does not fit a leaf, which is named.
    """
    sizes = []
    for path, shape in zip(names, layout.shapes, strict=True):
        if isinstance(pattern, Unstructured):
            sizes.append(1)
            continue
        if not -len(shape) <= pattern.axis < len(shape):
            raise ValueError(
                f"{pattern} needs an axis {pattern.axis}, which params{path} of shape {shape} "
                "does not have; leave the leaf out with path_filter."
            )
        along = shape[pattern.axis]
        if isinstance(pattern, Slices):
            sizes.append(math.prod(shape) // along if along else 0)
            continue
        size = pattern.m if isinstance(pattern, NofM) else pattern.size
        if along % size:
            raise ValueError(
                f"{pattern} needs axis {pattern.axis} to be a multiple of {size}, but "
                f"params{path} has shape {shape}; leave the leaf out with path_filter."
            )
        sizes.append(size)
    return Grouping(pattern, tuple(sizes))


def axis_orders(pattern: Pattern, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The order of axes in which the weights of a group are neighbours, for each leaf."""
    orders = []
    for shape in shapes:
        axes = list(range(len(shape)))
        if isinstance(pattern, Slices):
            axes.insert(0, axes.pop(pattern.axis))
        elif not isinstance(pattern, Unstructured):
            axes.append(axes.pop(pattern.axis))
        orders.append(tuple(axes))
    return tuple(orders)


def _check_axis(axis: object) -> None:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis must be a Python int, got {type(axis).__name__}.")
