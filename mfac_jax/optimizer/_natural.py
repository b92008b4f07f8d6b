"""Natural gradients in row space, for optax: all rows belong to the current step.

Least squares ``1/(2 n) sum_i r_i^2`` with Jacobian rows ``g_i = d r_i / d theta`` has the gradient
``G^T r / n`` and the Gauss-Newton matrix ``F = lambda I + G^T G / n``. The push-through identity
turns the natural gradient into n x n work beside one scan and one Gram matrix:

    F^-1 G^T r / n = G^T (n lambda I + G G^T)^-1 r

Physics-informed networks have residuals of the equation for ``r``. Variational Monte Carlo has
local energies for ``r`` and gradients of the log-amplitude for rows, both relative to their means.
The improved empirical Fisher has gradients of single losses for rows and
``r_i = |d loss_i / d logits_i|^2``.

References: Goldshlager, Abrahamsen, Lin, "A Kaczmarz-inspired approach to accelerate the
optimization of neural network wavefunctions" (SPRING), J. Comput. Phys. 516 (2024), equation 28.
Wu et al., "An Improved Empirical Fisher Approximation for Natural Gradient Descent", NeurIPS 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mfac_jax import _checks, algebra
from mfac_jax._layout import Layout, PyTree
from mfac_jax.optimizer._schedules import ScalarOrSchedule, check_dampings, damping_at
from mfac_jax.rows import Dense, GradientRows, as_rows

DEFAULT_RELATIVE_DAMPING = 1e-3


class NaturalGradientState(NamedTuple):
    """State of :func:`natural_gradient`.

    Attributes:
        count: the number of updates so far, rejected ones included; scalar int32.
        rejected: the number of updates with NaN or Inf in rows or residuals; scalar int32.
        previous: the last direction, a tree like the parameters; None without momentum.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # tuples have a method of this name
    rejected: Int[Array, ""]
    previous: PyTree | None


def natural_gradient(
    damping: ScalarOrSchedule | None = None,
    *,
    relative_damping: ScalarOrSchedule | None = None,
    momentum: float = 0.0,
    center: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Turns the rows and residuals of a step into its natural gradient.

    ``update`` takes rows in the place of a gradient, and the residuals as an extra argument. Its
    result is a tree like the parameters, which the rest of an ``optax.chain`` scales::

        updates, state = tx.update(rows, state, params, residuals=r)

    With ``momentum`` mu it is SPRING: the damping pulls towards ``mu`` times the last direction
    ``p``, not towards zero,

        p_new = mu p + G^T (n lambda I + G G^T)^-1 (r - mu G p).

    An update with NaN or Inf in it is rejected: the direction is zero, the state keeps its last
    direction, and the count ``rejected`` rises.

    Args:
        damping: ``lambda`` in the units of the squared rows: a number, a scalar array or a
            schedule (a function of the number of updates so far).
        relative_damping: the damping as a fraction of ``trace(G G^T) / n``, of centered rows if
            ``center``; 1e-3 if neither damping is given.
        momentum: ``mu`` in [0, 1). SPRING uses 0.99 with a limit on the length of the update, for
            which ``optax.clip_by_global_norm`` can follow in the chain.
        center: whether to subtract the mean of the rows and of the residuals, as variational
            Monte Carlo needs. Stacked gradients are centered before they are multiplied. With
            other rows this is n x n work, which loses ``(|mean| / spread)^2`` in relative accuracy.

    Returns:
        The transformation. ``update`` accepts stacked gradients, a tree like the parameters with
        leaves ``(n, *shape)``, or any :class:`mfac_jax.rows.GradientRows`. The number of rows may
        change from step to step, but each number compiles once. Rows are no gradients, so wrappers
        that pass them on (``optax.masked``, ``optax.partition``), add them up (``MultiSteps``) or
        return them (``apply_if_finite``) do not work: to freeze weights, take the rows of the
        others only.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has an impossible value. In ``update``: ``residuals`` are missing
            or are not (n,), or the rows do not fit the parameters.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from mfac_jax import natural_gradient
        >>> x = jnp.linspace(-1.0, 1.0, 8)
        >>> residuals = lambda w: w["a"] * x + w["b"] - (3.0 * x - 1.0)
        >>> tx = optax.chain(natural_gradient(1e-6), optax.scale_by_learning_rate(1.0))
        >>> w = {"a": jnp.zeros(()), "b": jnp.zeros(())}
        >>> rows = jax.jacrev(residuals)(w)
        >>> updates, state = tx.update(rows, tx.init(w), w, residuals=residuals(w))
        >>> w = optax.apply_updates(w, updates)
        >>> w["a"], w["b"]
        (Array(3., dtype=float32), Array(-1., dtype=float32))
    """
    if damping is None and relative_damping is None:
        relative_damping = DEFAULT_RELATIVE_DAMPING
    check_dampings(damping, relative_damping)
    _checks.static_decay(momentum, "momentum")
    damping_of = functools.partial(damping_at, damping, relative_damping)

    def init(params: PyTree) -> NaturalGradientState:
        previous = optax.tree.zeros_like(params) if momentum else None
        return NaturalGradientState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), previous)

    def update(
        updates: PyTree,
        state: NaturalGradientState,
        params: PyTree | None = None,
        *,
        residuals: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, NaturalGradientState]:
        del extra_args
        # A stacked tree is stored without a copy.
        rows = as_rows(updates, params, storage=Dense(packing="leaf"))
        by_gram = center and rows is updates
        if center and not by_gram:
            rows = as_rows(_centered(updates), params, storage=Dense(packing="leaf"))
        r, pull = _as_residuals(residuals, rows), None
        if momentum:
            pull = jax.tree.map(lambda p: momentum * p, state.previous)
            r = r - rows.dots(pull)
        if center:
            r = r - jnp.mean(r)
        lam = functools.partial(damping_of, state.count)
        direction = rows.combine(_coefficients(rows.gram(), r, lam, center=by_gram))
        if pull is not None:
            direction = jax.tree.map(lambda x, p: x + p.astype(x.dtype), direction, pull)
        return _guarded(direction, state, rows.layout)

    return optax.GradientTransformationExtraArgs(init, update)


def _centered(rows: PyTree) -> PyTree:
    """Stacked gradients without their mean."""

    def leaf(x: Any) -> Array:
        wide = jnp.asarray(x).astype(np.promote_types(jnp.result_type(x), np.float32))
        return wide - jnp.mean(wide, axis=0, keepdims=True)

    return jax.tree.map(leaf, rows)


def _coefficients(
    gram: Float[Array, "n n"],
    residuals: Float[Array, " n"],
    damping: Callable[[Float[Array, ""]], Float[Array, ""]],
    *,
    center: bool,
) -> Float[Array, " n"]:
    """``(n lambda I + K)^-1 r``, of centered rows if ``center``."""
    if center:
        mean = jnp.mean(gram, axis=0)
        gram = gram - mean[:, None] - mean[None, :] + jnp.mean(mean)
    shift = len(gram) * damping(jnp.trace(gram) / len(gram))
    solved = algebra.shared_solve(algebra.factor(gram, shift), gram, shift, residuals)
    return solved - jnp.mean(solved) if center else solved


def _guarded(
    direction: PyTree, state: NaturalGradientState, layout: Layout
) -> tuple[PyTree, NaturalGradientState]:
    """The direction in the dtypes of the parameters, zero if it is not finite; and the state."""
    accepted = jnp.isfinite(optax.tree.norm(direction, squared=True))
    direction = jax.tree.map(lambda x: jnp.where(accepted, x, jnp.zeros_like(x)), direction)
    previous = state.previous
    if previous is not None:
        previous = jax.tree.map(
            lambda old, new: jnp.where(accepted, new.astype(old.dtype), old), previous, direction
        )
    rejected = state.rejected + 1 - accepted.astype(jnp.int32)
    pairs = zip(jax.tree.leaves(direction), layout.dtypes, strict=True)
    leaves = [leaf.astype(dtype) for leaf, dtype in pairs]
    updates = jax.tree.unflatten(layout.treedef, leaves)
    count = optax.safe_increment(state.count)
    return updates, NaturalGradientState(count, rejected, previous)


def _as_residuals(residuals: ArrayLike | None, rows: GradientRows) -> Float[Array, " n"]:
    if residuals is None:
        raise ValueError(
            "natural_gradient needs the residuals of the step: "
            "call update(rows, state, params, residuals=r), got residuals=None."
        )
    if jnp.shape(residuals) != (rows.num_rows,):
        raise ValueError(
            f"residuals must have shape ({rows.num_rows},), one for each row; "
            f"got {jnp.shape(residuals)}."
        )
    return jnp.asarray(residuals).astype(rows.dtype)
