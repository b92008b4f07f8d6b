"""The gradients of the last pruning steps, in one set of rows.

A step's own gradients are few. Those of the steps before it were taken nearby, at weights that
were pruned less, and say much the same about the curvature. Only their size is another, since
gradients grow with the loss; so they are scaled to the newest ones.

There is room for all steps from the first one on, so that every step runs the same programs.
Rows that are not filled yet are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mfac_jax.rows import FlatRows

Fill = Callable[[FlatRows | None, int], FlatRows]


class History:
    """Holds the gradients of some steps, ``num_gradients`` each; the oldest give way.

    Attributes:
        rows: all that are held; None at first.
    """

    def __init__(self, num_steps: int, num_gradients: int):
        self.rows: FlatRows | None = None
        self._num_steps, self._count, self._taken = num_steps, num_gradients, 0

    @property
    def num_rows(self) -> int:
        """Capacity in rows."""
        return self._num_steps * self._count

    def take(self, fill: Fill, alive: Sequence[Array]) -> FlatRows:
        """Takes in the gradients of a step.

        Args:
            fill: writes them into the rows, from a given one on, and returns these; the rows are
                donated. Without rows it makes ``num_rows`` of them, zero elsewhere.
            alive: the mask of all parameters.

        Returns:
            All that are held.
        """
        self.rows = fill(self.rows, self._taken % self._num_steps * self._count)
        self._taken += 1
        if min(self._taken, self._num_steps) > 1:
            self.rows = _level(self.rows, self._is_newest, tuple(alive), count=self._count)
        return self.rows

    @property
    def filled(self) -> float:
        """The fraction of the rows that hold gradients."""
        return min(self._taken, self._num_steps) / self._num_steps

    @property
    def mean(self) -> Float[np.ndarray, " m"]:
        """``a`` such that ``G^T a`` is the mean of the newest gradients."""
        return (self._is_newest / self._count).astype(np.float32)

    @property
    def _is_newest(self) -> Bool[np.ndarray, " m"]:
        slot = (self._taken - 1) % self._num_steps
        return np.repeat(np.arange(self._num_steps) == slot, self._count)


@functools.partial(jax.jit, static_argnames="count", donate_argnames="rows")
def _level(
    rows: FlatRows, is_newest: Bool[Array, " m"], alive: tuple[Array, ...], *, count: int
) -> FlatRows:
    """The older gradients scaled to the mean square of the newest, on what is alive."""
    squares = rows.squares(jax.tree.unflatten(rows.layout.treedef, alive))
    of_steps = jnp.sum(squares.reshape(-1, count), axis=1)
    newest = jnp.sum(jnp.where(is_newest, squares, jnp.zeros_like(squares)))
    has_any = (of_steps > 0) & (newest > 0)
    factors = jnp.sqrt(newest / jnp.where(has_any, of_steps, jnp.ones_like(of_steps)))
    factors = jnp.repeat(jnp.where(has_any, factors, jnp.ones_like(factors)), count)
    return rows.scale(jnp.where(is_newest, jnp.ones_like(factors), factors))
