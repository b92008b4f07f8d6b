"""The gradients of the last pruning steps, in one set of rows.

A step's own gradients are few. Those of the steps before it were taken nearby, at weights that
were pruned less, and say much the same about the curvature. Only their size is another, since
gradients grow with the loss; so they are scaled to the newest ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

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

    def take(self, fill: Fill, alive: Sequence[Array]) -> FlatRows:
        """Takes the gradients of a step in.

        Args:
            fill: writes them into rows, which are used up, from a given one on; without rows
                it makes some.
            alive: the mask of all parameters.

        Returns:
            All that are held.
        """
        count, slot = self._count, self._taken % self._num_steps
        if self.rows is not None and self._taken < self._num_steps:
            self.rows = _longer(self.rows, count)
        self.rows = fill(self.rows, slot * count)
        self._taken += 1
        if self.rows.num_rows > count:
            self.rows = _level(self.rows, self.fresh, tuple(alive), count=count)
        return self.rows

    @property
    def fresh(self) -> Bool[Array, " m"]:
        """Which rows are the newest."""
        held = min(self._taken, self._num_steps)
        newest = (self._taken - 1) % self._num_steps
        return jnp.asarray(np.repeat(np.arange(held) == newest, self._count))


@functools.partial(jax.jit, static_argnames="count")
def _longer(rows: FlatRows, count: int) -> FlatRows:
    return rows._replace(block=jnp.pad(rows.block, ((0, 0), (0, count), (0, 0))))


@functools.partial(jax.jit, static_argnames="count", donate_argnames="rows")
def _level(
    rows: FlatRows, fresh: Bool[Array, " m"], alive: tuple[Array, ...], *, count: int
) -> FlatRows:
    """The older gradients scaled to the mean square of the fresh ones, on what is alive."""
    squares = rows.squares(jax.tree.unflatten(rows.layout.treedef, alive))
    of_steps = jnp.sum(squares.reshape(-1, count), axis=1)
    newest = jnp.sum(jnp.where(fresh, squares, jnp.zeros_like(squares)))
    has_any = (of_steps > 0) & (newest > 0)
    scales = jnp.sqrt(newest / jnp.where(has_any, of_steps, jnp.ones_like(of_steps)))
    scales = jnp.repeat(jnp.where(has_any, scales, jnp.ones_like(scales)), count)
    return rows.scale(jnp.where(fresh, jnp.ones_like(scales), scales))
