"""Patterns: which weights can only go together.

A pattern cuts every leaf into *groups* of weights. It says which weights a group has, how many of
them may go, and how much they cost.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
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
from mfac_jax.pruning._greedy import greedy_records


class Groups(NamedTuple):
    """The groups of a pattern in one leaf.

    Attributes:
        size: the number of weights of a group.
        order: the places of all weights in the flattened leaf, group after group; (k,). None
            if the weights already lie in this order.
        num_outputs: the number of equal parts of ``order``, each of whole groups.
            :class:`WithinOutputs` cuts no block across the end of a part. If possible, a part
            is an output, because the weights that one output sums over compensate for one
            another.
    """

    size: int
    order: Int[np.ndarray, " k"] | None = None
    num_outputs: int = 1


class Pattern(abc.ABC):
    """Which weights can only go together.

    Your own pattern is a frozen dataclass that derives from this class. It must define
    :meth:`groups`. By default a group goes whole, and its score is the cost of all its weights
    together. Override the other members if your pattern differs:

    - :attr:`group_size`, if groups have the same size in every leaf. Blocks of the Fisher may
      then be smaller than a leaf.
    - :attr:`removable`, :meth:`combine` and :meth:`cost`, if only some weights of a group may
      go.

    Example:
        >>> from dataclasses import dataclass
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from mfac_jax import pruning, rows
        >>> @dataclass(frozen=True)
        ... class Mirrored(pruning.Pattern):
        ...     group_size = 2
        ...
        ...     def groups(self, shape, output_axis, name):
        ...         last = np.prod(shape) - 1
        ...         return pruning.Groups(
        ...             2, np.array([(i, last - i) for i in range((last + 1) // 2)]).reshape(-1)
        ...         )
        >>> w = jnp.array([[3.0, 1.0, 5.0], [4.0, 2.0, 3.0]])
        >>> _, mask, _ = pruning.prune_step(
        ...     w,
        ...     pruning.initial_mask(w),
        ...     rows.as_rows(jnp.ones((2, 2, 3))),
        ...     0.4,
        ...     damping=0.1,
        ...     score="magnitude",
        ...     scope=pruning.Scope(pattern=Mirrored()),
        ... )
        >>> mask
        Array([[ True, False,  True],
               [ True, False,  True]], dtype=bool)
    """

    @property
    def has_own_rule(self) -> bool:
        """Whether the pattern overrides :meth:`combine` and :meth:`cost`."""
        return type(self).combine is not Pattern.combine and type(self).cost is not Pattern.cost

    @property
    def greedy_quota(self) -> int | None:
        """The number of weights that greedy removal takes from a group, one by one.

        None if groups go whole, or if greedy removal cannot follow the rule of the pattern.
        """
        return None

    @property
    def is_greedy(self) -> bool:
        """Whether greedy removal can follow the pattern, by whole groups or by the quota."""
        own = type(self).combine is not Pattern.combine or type(self).cost is not Pattern.cost
        return self.greedy_quota is not None or (self.goes_whole and not own)

    @abc.abstractmethod
    def groups(self, shape: tuple[int, ...], output_axis: int, name: str) -> Groups:
        """The groups of a leaf.

        Args:
            shape: the shape of the leaf.
            output_axis: the axis of the outputs as the caller gave it. It may be negative, and
                the leaf may lack it.
            name: the path of the leaf, such as ``"['kernel']"``, for messages.

        Raises:
            ValueError: the pattern does not fit the leaf.
        """

    @property
    def group_size(self) -> int | None:
        """The number of weights of a group, the same in every leaf; None if leaves differ."""
        return None

    @property
    def removable(self) -> float:
        """The fraction of a group that may go; 1 if groups go whole."""
        return 1.0

    @property
    def goes_whole(self) -> bool:
        """Whether a group goes whole, that is, whether :attr:`removable` is 1."""
        return self.removable == 1

    def combine(
        self, scores: Float[Array, "k g"], alive: Bool[Array, "k g"]
    ) -> Float[Array, "k g"]:
        """Scores of groups from scores of single weights.

        Args:
            scores: the scores of the weights, one group in each row.
            alive: which weights are alive.

        Returns:
            The scores by which weights go, lowest first. By default each weight gets the sum
            over its group. A weight with score inf does not go.
        """
        del alive
        return jnp.broadcast_to(jnp.sum(scores, axis=1, keepdims=True), scores.shape)

    def cost(
        self, blocks: GroupBlocks, weights: Float[Array, "*b g"], alive: Bool[Array, "*b g"]
    ) -> Float[Array, "*b g"]:
        """Scores of groups from ``[F^-1]_QQ``, for the weights Q of each group.

        Args:
            blocks: ``[F^-1]_QQ`` of a batch of groups.
            weights: ``w_Q``; 0 for weights that are not alive.
            alive: which weights are alive.

        Returns:
            The scores, as in :meth:`combine`. By default each weight gets the least rise of the
            quadratic model when its group goes, ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q``.
        """
        del alive
        cost = blocks.inverse_quadratic_form(weights) / 2
        return jnp.broadcast_to(cost[..., None], weights.shape)


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
        check_axis(self.axis)

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
        return greedy_records(
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
        check_axis(self.axis)

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
        check_axis(self.axis)

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


def check_pattern(pattern: object) -> None:
    """Checks that ``pattern`` is a pattern.

    Raises:
        TypeError: ``pattern`` is not a pattern, or is not hashable.
        ValueError: groups do not go whole, and the pattern does not say which weights go.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(
            "pattern must be one of Unstructured(), NofM(n, m), BlocksOf(size) and Slices(), or "
            f"a Pattern of your own; got {pattern!r}."
        )
    try:
        hash(pattern)
    except TypeError as error:
        raise TypeError(
            f"pattern must be hashable, as a frozen dataclass is; got {pattern!r}."
        ) from error
    if not pattern.goes_whole and not pattern.has_own_rule:
        raise ValueError(
            f"{pattern!r} prunes a fraction {pattern.removable} of a group, so it must say which "
            "weights go: expected it to override combine and cost."
        )


def groups_of(pattern: Pattern, shape: tuple[int, ...], output_axis: int, name: str) -> Groups:
    """The groups of a leaf; checks that they hold every weight exactly once.

    Args:
        pattern: the pattern.
        shape: the shape of the leaf.
        output_axis: the axis of the outputs as the caller gave it.
        name: the path of the leaf.

    Raises:
        ValueError: the pattern does not fit the leaf, or its groups do not cover the leaf.
    """
    groups, total = pattern.groups(shape, output_axis, name), math.prod(shape)
    if not total:
        return groups
    where = f"the groups that {pattern} makes of params{name} of shape {shape}"
    expected = pattern.group_size or groups.size
    if groups.size != expected or groups.size < 1 or total % groups.size:
        raise ValueError(
            f"{where} must have one size: expected {pattern.group_size or 'a divisor'} of "
            f"{total} weights, got {groups.size}."
        )
    if groups.num_outputs < 1 or total // groups.size % groups.num_outputs:
        raise ValueError(
            f"{where} must fall into num_outputs equal parts: expected a divisor of "
            f"{total // groups.size} groups, got {groups.num_outputs}."
        )
    if groups.order is not None and not _is_permutation(np.asarray(groups.order), total):
        raise ValueError(
            f"{where} must hold every weight once: expected an order of the places "
            f"0 .. {total - 1}, got {groups.order}."
        )
    return groups


def _is_permutation(order: Int[np.ndarray, "..."], total: int) -> bool:
    if order.shape != (total,) or order.min() < 0 or order.max() >= total:
        return False
    return bool(np.all(np.bincount(order, minlength=total) == 1))


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


def check_axis(axis: object, name: str = "axis") -> None:
    """Checks that ``axis`` is an int or None.

    Raises:
        TypeError: it is neither.
    """
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise TypeError(f"{name} must be a Python int, got {type(axis).__name__}.")
