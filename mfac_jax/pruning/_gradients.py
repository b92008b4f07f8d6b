"""The gradients of a pruning run: where they come from, and which are kept.

A step's own gradients are few. Those of earlier steps were taken nearby, with fewer weights pruned,
and say much the same about the curvature. Only their size differs, since gradients grow with the
loss; so they are scaled to the newest ones.

Each step's gradients are rows of their own, stacked. All rows exist from the first step on, so
that every step runs the same programs. Rows that are not filled yet are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mfac_jax import _checks
from mfac_jax._layout import PyTree
from mfac_jax.pruning._finite import check_finite_gradients
from mfac_jax.pruning._problem import Grams
from mfac_jax.rows import (
    Dense,
    GradientRows,
    StackedRows,
    Storage,
    WritableRows,
    check_rows,
    check_storage,
    check_writable,
)

Fill = Callable[[WritableRows], WritableRows]


@dataclass(frozen=True)
class Gradients:
    """Where :func:`prune` takes the gradients of each step from.

    Attributes:
        count: how many each step takes.
        per_example: one gradient an example in place of one a batch.
        given: the gradients of the first step, if they exist already; taken at ``params``, all
            leaves. With them several sparsities can share one set of gradients. They are used
            as they are, in their own storage, and never copied or changed.
        history: how many earlier steps' gradients are used as well; each takes as much memory
            again, from the first step on.
        storage: how gradients are stored; see :class:`mfac_jax.rows.Dense`.
    """

    count: int = 128
    per_example: bool = False
    given: GradientRows | None = None
    history: int = 1
    storage: Storage = Dense()  # noqa: RUF009  (immutable)

    def __post_init__(self) -> None:
        _checks.positive_int(self.count, "count")
        _checks.non_negative_int(self.history, "history")
        check_storage(self.storage)
        if not isinstance(self.per_example, bool):
            raise TypeError(f"per_example must be a bool, got {type(self.per_example).__name__}.")
        if self.given is None:
            return
        check_rows(self.given)
        if self.given.num_rows != self.count:
            raise ValueError(
                f"given must be count={self.count} gradients, got {self.given.num_rows}."
            )

    def check(self, params: PyTree) -> None:
        """Checks that the gradients that are given are those of ``params``.

        Raises:
            ValueError: they are of other parameters.
            FloatingPointError: they have NaN or Inf in them.
        """
        if self.given is not None:
            self.given.layout.check(params, "params")
            check_finite_gradients(self.given)


class History:
    """Keeps the gradients of some steps; those of a new step replace the oldest.

    Attributes:
        rows: all gradients that are kept, the older ones scaled.
        grams: the Gram matrices of these rows.
    """

    rows: GradientRows
    grams: Grams

    def __init__(self, gradients: Gradients, params: PyTree, steps: int) -> None:
        self._gradients = gradients
        self._num_parts = min(1 + gradients.history, steps)
        self._like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        self._parts: list[GradientRows] = []
        self._taken = 0

    def take(self, fill: Fill, alive: PyTree) -> None:
        """Adds the gradients of a step.

        Args:
            fill: writes them into the rows that it is given, which are donated.
            alive: the mask of all parameters.
        """
        slot = self._taken % self._num_parts
        if self._taken == 0:
            given = self._gradients.given
            first = fill(self._empty()) if given is None else given
            self._parts = [first, *(self._empty() for _ in range(self._num_parts - 1))]
        else:
            oldest = self._parts[slot]
            if oldest is self._gradients.given:  # the caller's own
                oldest = self._empty()
            self._parts[slot] = fill(check_writable(oldest, "the history of gradients"))
        self._taken += 1
        if self._num_parts == 1:
            self.rows = self._parts[0]
            self.grams = Grams(self.rows)
            return
        parts = tuple(self._parts)
        ones = np.ones(self._num_parts, np.float32)
        stacked = StackedRows.of(parts, jnp.asarray(ones, parts[0].dtype))
        gram = np.asarray(stacked.gram(alive))
        scales = _levels(gram, slot, self._num_parts)
        self.rows = StackedRows.of(parts, jax.device_put(scales))
        self.grams = Grams(self.rows)
        each = np.repeat(scales, self._gradients.count)
        self.grams.add(alive, jax.device_put(gram * each[:, None] * each[None, :]))

    @property
    def filled(self) -> float:
        """The fraction of the rows that hold gradients."""
        return min(self._taken, self._num_parts) / self._num_parts

    @property
    def mean(self) -> Float[np.ndarray, " m"]:
        """``a`` such that ``G^T a`` is the mean of the newest gradients."""
        slot, count = (self._taken - 1) % self._num_parts, self._gradients.count
        is_newest = np.repeat(np.arange(self._num_parts) == slot, count)
        return (is_newest / count).astype(np.float32)

    def _empty(self) -> WritableRows:
        return self._gradients.storage.empty(self._like, self._gradients.count)


def _levels(gram: Float[np.ndarray, "m m"], newest: int, num_parts: int) -> Float[np.ndarray, " p"]:
    """The scales at which all parts have the mean square of the newest."""
    squares = np.diagonal(gram).reshape(num_parts, -1).sum(axis=1)
    # A step without any gradient sets no level, nor has one.
    has_level = (squares > 0) & (squares[newest] > 0)
    ratios = np.divide(squares[newest], squares, out=np.ones_like(squares), where=has_level)
    return np.sqrt(ratios)
