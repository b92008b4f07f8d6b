"""The interface of patterns: which weights can only go together.

A pattern cuts every leaf into *groups* of weights. It says which weights a group has, how many of
them may go, and how much they cost.
"""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks
from mfac_jax.inverse import GroupBlocks


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
    - :attr:`greedy_quota`, if ``score="greedy"`` can follow such a pattern. It supports other
      patterns if they override neither :meth:`combine` nor :meth:`cost`;
      :attr:`supports_greedy` says whether it does.

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
    def greedy_quota(self) -> int | None:
        """The number of weights that greedy removal takes from a group, one by one.

        None if groups go whole, or if greedy removal cannot follow the rule of the pattern.
        """
        return None

    @property
    def supports_greedy(self) -> bool:
        """Whether greedy removal can follow the pattern, by whole groups or by the quota."""
        return self.greedy_quota is not None or (self.prunes_whole_groups and not _overridden(self))

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
    def prunes_whole_groups(self) -> bool:
        """Whether all weights of a group go together: whether :attr:`removable` is 1."""
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


def check_pattern(pattern: object) -> None:
    """Checks that ``pattern`` is a pattern.

    Raises:
        TypeError: ``pattern`` is not a pattern, is not hashable, or a member has another type.
        ValueError: a member is out of range; or groups do not go whole, and the pattern does not
            say which weights go.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a Pattern, such as mfac_jax.pruning.Unstructured(), got {pattern!r}."
        )
    try:
        hash(pattern)
    except TypeError as error:
        raise TypeError(
            f"pattern must be hashable, as a frozen dataclass is; got {pattern!r}."
        ) from error
    for name in ("group_size", "greedy_quota"):
        value = getattr(pattern, name)
        if value is not None:
            _checks.positive_int(value, f"{name} of {pattern}")
    _checks.positive_scalar(pattern.removable, f"removable of {pattern}")
    _checks.unit_interval(pattern.removable, f"removable of {pattern}")
    if not pattern.prunes_whole_groups and len(_overridden(pattern)) < 2:
        raise ValueError(
            f"{pattern!r} prunes a fraction {pattern.removable} of a group, so it must say which "
            "weights go: expected it to override combine and cost."
        )


def _overridden(pattern: Pattern) -> list[str]:
    """Which of ``combine`` and ``cost`` the pattern overrides."""
    own, default = type(pattern), Pattern
    return [name for name in ("combine", "cost") if getattr(own, name) != getattr(default, name)]


def groups_of(pattern: Pattern, shape: tuple[int, ...], output_axis: int, name: str) -> Groups:
    """The groups of a leaf; checks that they hold every weight exactly once.

    The order is in int32.

    Args:
        pattern: the pattern.
        shape: the shape of the leaf.
        output_axis: the axis of the outputs as the caller gave it.
        name: the path of the leaf.

    Raises:
        TypeError: the pattern does not return :class:`Groups`, or a field has another type.
        ValueError: the pattern does not fit the leaf, or its groups do not cover the leaf.
    """
    where = f"the groups that {pattern} makes of params{name} of shape {shape}"
    groups, total = pattern.groups(shape, output_axis, name), math.prod(shape)
    if not isinstance(groups, Groups):
        raise TypeError(
            f"{where} must be pruning.Groups(size, order, num_outputs), got {groups!r}."
        )
    for field in ("size", "num_outputs"):
        value = getattr(groups, field)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{where} must have an int as {field}, got {value!r}.")
    if not total:
        return groups._replace(order=None)
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
    if groups.order is None:
        return groups
    order = np.asarray(groups.order)
    if not _is_permutation(order, total):
        raise ValueError(
            f"{where} must hold every weight once: expected an order of the places "
            f"0 .. {total - 1}, got {groups.order}."
        )
    return groups._replace(order=order.astype(np.int32))


def _is_permutation(order: np.ndarray, total: int) -> bool:
    if order.shape != (total,) or not np.issubdtype(order.dtype, np.integer):
        return False
    if order.min() < 0 or order.max() >= total:
        return False
    return bool(np.all(np.bincount(order, minlength=total) == 1))


def check_group_scores(
    scores: Any, weights: Float[Array, "*b g"], method: str, pattern: Pattern
) -> Float[Array, "*b g"]:
    """Checks what :meth:`Pattern.combine` or :meth:`Pattern.cost` returns, and returns it.

    Raises:
        TypeError: it is not an array of real numbers in the shape of the weights.
    """
    is_array = isinstance(scores, jax.Array)
    if is_array and scores.shape == weights.shape and jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    got = f"{scores.dtype.name}{list(scores.shape)}" if is_array else type(scores).__name__
    raise TypeError(
        f"{method} of {pattern} must return one real floating-point number for each weight: "
        f"expected an array of shape {list(weights.shape)}, got {got}."
    )
