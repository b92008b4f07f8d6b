"""The patterns of the library: single weights, N:M, neighbours and slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks
from mfac_jax.inverse import GroupBlocks
from mfac_jax.pruning._choices import (
    MOST_CHOICES,
    cheapest_choice,
    lowest_in_groups,
    num_choices,
)
from mfac_jax.pruning._greedy import greedy_scores
from mfac_jax.pruning._interface import Groups, Pattern


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight can go on its own. This is the default pattern."""

    @property
    def group_size(self) -> int:
        """1."""
        return 1

    def groups(self, shape: tuple[int, ...], output_axis: int, name: str) -> Groups:
        """Single weights, one output after another."""
        axes = _output_first(shape, output_axis, name)
        return Groups(1, _order(shape, axes), _extent(shape, axes))


@dataclass(frozen=True)
class NofM(Pattern):
    """At least ``n`` of every ``m`` neighbours stay: no step prunes more than ``m - n``.

    ``NofM(2, 4)`` is the 2:4 pattern of sparse matrix units.

    Attributes:
        n: the number of weights that stay in each group.
        m: the number of neighbours in a group.
        axis: the axis along which they are neighbours. By default the axis of the inputs, along
            which products are summed. It comes before the axis of the outputs if that is the
            last axis, as in Flax, and after it otherwise.
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
            _checks.axis(self.axis, "axis")

    @property
    def group_size(self) -> int:
        """``m``."""
        return self.m

    @property
    def greedy_quota(self) -> int:
        """``m - n``."""
        return self.m - self.n

    @property
    def removable(self) -> float:
        """``(m - n) / m``."""
        return (self.m - self.n) / self.m

    def groups(self, shape: tuple[int, ...], output_axis: int, name: str) -> Groups:
        """Neighbours along the axis."""
        return _neighbours(self, self.m, shape, output_axis, name)

    def combine(
        self, scores: Float[Array, "k g"], alive: Bool[Array, "k g"]
    ) -> Float[Array, "k g"]:
        """The ``m - n`` lowest scores of a group; inf for the other weights."""
        return lowest_in_groups(scores, alive, self.m - self.n)

    def cost(
        self, blocks: GroupBlocks, weights: Float[Array, "*b g"], alive: Bool[Array, "*b g"]
    ) -> Float[Array, "*b g"]:
        """The cost of the ``m - n`` weights that cost least together; inf for the other weights."""
        if num_choices(self.n, self.m) <= MOST_CHOICES:
            return cheapest_choice(blocks, weights, alive, self.n)
        size, shape = self.m, weights.shape
        return greedy_scores(
            blocks.matrix.reshape(-1, size, size),
            weights.reshape(-1, size),
            alive.reshape(-1, size),
            blocks.floor.reshape(-1, size),
            size=size,
            quota=self.m - self.n,
        ).reshape(shape)


@dataclass(frozen=True)
class BlocksOf(Pattern):
    """``size`` neighbours go together.

    Attributes:
        size: the number of neighbours in a group.
        axis: the axis along which they are neighbours; by default the axis of the inputs, as in
            :class:`NofM`.
    """

    size: int
    axis: int | None = None

    def __post_init__(self) -> None:
        _checks.positive_int(self.size, "size")
        if self.axis is not None:
            _checks.axis(self.axis, "axis")

    @property
    def group_size(self) -> int:
        """``size``."""
        return self.size

    def groups(self, shape: tuple[int, ...], output_axis: int, name: str) -> Groups:
        """Neighbours along the axis."""
        return _neighbours(self, self.size, shape, output_axis, name)


@dataclass(frozen=True)
class Slices(Pattern):
    """All weights with one index along an axis go together.

    ``Slices()`` prunes output channels (or neurons), ``Slices(axis=0)`` and
    ``Slices(axis=1)`` rows and columns of matrices.

    Attributes:
        axis: the axis; the axis of the outputs by default.
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        if self.axis is not None:
            _checks.axis(self.axis, "axis")

    def groups(self, shape: tuple[int, ...], output_axis: int, name: str) -> Groups:
        """One slice after another."""
        axes = list(range(len(shape)))
        if self.axis is None:
            axis = _output_axis(name, shape, output_axis)
        else:
            axis = _own_axis(self, self.axis, name, shape)
        axes.insert(0, axes.pop(axis))
        along = shape[axis]
        size = math.prod(shape) // along if along else 0
        return Groups(size, _order(shape, axes), _extent(shape, axes))


def _neighbours(
    pattern: NofM | BlocksOf, size: int, shape: tuple[int, ...], output_axis: int, name: str
) -> Groups:
    rank = len(shape)
    if pattern.axis is None:  # the axis of the inputs
        axis = _output_axis(name, shape, output_axis)
        axis = axis - 1 if axis == rank - 1 else axis + 1
        if not 0 <= axis < rank:
            raise _no_axis(pattern, "an axis of inputs", name, shape)
    else:
        axis = _own_axis(pattern, pattern.axis, name, shape)
    if shape[axis] % size:
        raise ValueError(
            f"{pattern} needs axis {axis} to be a multiple of {size}, but params{name} has "
            f"shape {shape}; leave the leaf out with path_filter."
        )
    axes = _output_first(shape, output_axis, name)
    if len(axes) > 1:
        axes.remove(axis)
        axes.append(axis)
    return Groups(size, _order(shape, axes), _extent(shape, axes))


def _output_first(shape: tuple[int, ...], output_axis: int, name: str) -> list[int]:
    """The axes in PyTorch's order: outputs, inputs, then the window of a convolution."""
    axes = list(range(len(shape)))
    if len(axes) > 1:
        axes.insert(0, axes.pop(_output_axis(name, shape, output_axis)))
        if axes[0] == len(axes) - 1:
            axes.insert(1, axes.pop())
    return axes


def _order(shape: tuple[int, ...], axes: Sequence[int]) -> Int[np.ndarray, " k"] | None:
    """The places of the weights with the axes in this order; None if the order is unchanged."""
    if list(axes) == sorted(axes):
        return None
    places = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    return np.ascontiguousarray(places.transpose(axes)).reshape(-1)


def _extent(shape: tuple[int, ...], axes: Sequence[int]) -> int:
    return shape[axes[0]] if len(axes) > 1 else 1


def _own_axis(pattern: Pattern, axis: int, name: str, shape: tuple[int, ...]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise _no_axis(pattern, f"an axis {axis}", name, shape)
    return axis % len(shape)


def _no_axis(pattern: Pattern, wanted: str, name: str, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{pattern} needs {wanted}, which params{name} of shape {shape} does not have; "
        "leave the leaf out with path_filter."
    )


def _output_axis(name: str, shape: tuple[int, ...], output_axis: int) -> int:
    if not -len(shape) <= output_axis < len(shape):
        raise ValueError(
            f"output_axis={output_axis} needs such an axis, which params{name} of shape {shape} "
            "does not have; leave the leaf out with path_filter."
        )
    return output_axis % len(shape)
