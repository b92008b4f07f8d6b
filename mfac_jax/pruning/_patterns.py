"""Patterns: which weights can only go together.

A pattern cuts every leaf into *groups* of neighbouring weights. For the groups to be rows of
a matrix, a leaf is turned, its axes put into another order and made two: groups, and weights
of a group. What scores, masks and updates work on is turned so.

Leaves are also turned so that all weights of an output are neighbours, for the blocks of the
Fisher: the weights that one output sums over make up for one another, those of different
outputs hardly do.
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
        axis: the axis they are neighbours along. By default that of the inputs, which
            products are summed along: the last but one in Flax, where the last is that of the
            outputs, and otherwise the one after that of the outputs.
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self) -> None:
        _checks.positive_int(self.n, "n")
        _checks.positive_int(self.m, "m")
        if self.n >= self.m:
            raise ValueError(f"n must be below m, got n={self.n}, m={self.m}.")
        if self.axis is not None:
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
        axis: the axis they are neighbours along; by default that of the inputs, as in
            :class:`NofM`.
    """

    size: int
    axis: int | None = None

    def __post_init__(self) -> None:
        _checks.positive_int(self.size, "size")
        if self.axis is not None:
            _check_axis(self.axis)


@dataclass(frozen=True)
class Slices:
    """All weights with one index along an axis go together.

    ``Slices()`` prunes output channels (or neurons), ``Slices(axis=0)`` and
    ``Slices(axis=1)`` rows and columns of matrices.

    Attributes:
        axis: the axis; that of the outputs by default.
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        if self.axis is not None:
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
        orders: the axes of each leaf in the order in which the weights of a group are
            neighbours, and those of an output where a group leaves that open.
    """

    pattern: Pattern
    sizes: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Weights of the largest group."""
        return max(self.sizes, default=1)

    @property
    def goes_whole(self) -> bool:
        """Whether the groups of several weights go as a whole."""
        return isinstance(self.pattern, BlocksOf | Slices)

    @property
    def turned(self) -> Grouping:
        """The same groups of leaves that have been turned already."""
        return self._replace(orders=tuple(tuple(range(len(order))) for order in self.orders))

    @property
    def most(self) -> float:
        """The largest fraction of the weights that may go."""
        pattern = self.pattern
        return pattern.removable / pattern.m if isinstance(pattern, NofM) else 1.0


def group(
    pattern: Pattern, layout: Layout, names: Sequence[str], output_axis: int = -1
) -> Grouping:
    """The groups that a pattern makes of the parameters (before they are turned).

    Args:
        pattern: the pattern.
        layout: the prunable parameters.
        names: what they are called, for messages.
        output_axis: the axis of the outputs in leaves of several axes.

    Returns:
        The groups.

    Raises:
        TypeError: ``output_axis`` is not an int.
        ValueError: the pattern does not fit a leaf, or a leaf has no such ``output_axis``;
            the leaf is named.
    """
    _check_axis(output_axis, "output_axis")
    pairs = list(zip(names, layout.shapes, strict=True))
    return Grouping(
        pattern,
        tuple(_group_size(pattern, *pair, output_axis) for pair in pairs),
        tuple(_axis_order(pattern, *pair, output_axis) for pair in pairs),
    )


def _group_size(pattern: Pattern, path: str, shape: tuple[int, ...], output_axis: int) -> int:
    if isinstance(pattern, Unstructured):
        return 1
    axis = _axis(pattern, path, shape, output_axis)
    along = shape[axis]
    if isinstance(pattern, Slices):
        return math.prod(shape) // along if along else 0
    size = pattern.m if isinstance(pattern, NofM) else pattern.size
    if along % size:
        raise ValueError(
            f"{pattern} needs axis {axis} to be a multiple of {size}, but params{path} has "
            f"shape {shape}; leave the leaf out with path_filter."
        )
    return size


def _axis_order(
    pattern: Pattern, path: str, shape: tuple[int, ...], output_axis: int
) -> tuple[int, ...]:
    axes = list(range(len(shape)))
    if isinstance(pattern, Slices):
        axes.insert(0, axes.pop(_axis(pattern, path, shape, output_axis)))
        return tuple(axes)
    if len(shape) < 2:
        return tuple(axes)
    axes.insert(0, axes.pop(_output_axis(path, shape, output_axis)))
    # Then inputs, then the places of a convolution: the order of PyTorch, out of that of Flax.
    if axes[0] == len(shape) - 1:
        axes.insert(1, axes.pop())
    if not isinstance(pattern, Unstructured):
        along = _axis(pattern, path, shape, output_axis)
        axes.remove(along)
        axes.append(along)
    return tuple(axes)


def _axis(
    pattern: NofM | BlocksOf | Slices, path: str, shape: tuple[int, ...], output_axis: int
) -> int:
    """The axis of a pattern in a leaf, counted from 0."""
    axis, rank = pattern.axis, len(shape)
    if axis is None:
        axis = _output_axis(path, shape, output_axis)
        if not isinstance(pattern, Slices):  # the inputs
            axis = axis - 1 if axis == rank - 1 else axis + 1
    elif -rank <= axis < rank:
        axis %= rank
    if not 0 <= axis < rank:
        wanted = "an axis of inputs" if pattern.axis is None else f"an axis {pattern.axis}"
        raise ValueError(
            f"{pattern} needs {wanted}, which params{path} of shape {shape} does not have; "
            "leave the leaf out with path_filter."
        )
    return axis


def _output_axis(path: str, shape: tuple[int, ...], output_axis: int) -> int:
    if not -len(shape) <= output_axis < len(shape):
        raise ValueError(
            f"output_axis={output_axis} needs such an axis, which params{path} of shape {shape} "
            "does not have; leave the leaf out with path_filter."
        )
    return output_axis % len(shape)


def _check_axis(axis: object, name: str = "axis") -> None:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"{name} must be a Python int, got {type(axis).__name__}.")
