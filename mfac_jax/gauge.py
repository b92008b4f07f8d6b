"""A gauge of directions: how far one step along a direction can reduce the loss.

Let ``L(theta)`` be a loss with gradient ``g`` and true Fisher, or Gauss-Newton, matrix ``F``. Along
a direction ``D`` the quadratic model

    q(t) = L - t D^T g + t^2/2 D^T F D

has its minimum at ``t = D^T g / D^T F D``. There it lies ``(D^T g)^2 / (2 D^T F D)`` below ``L``.
The gauge is ``sqrt(D^T F D) / |D^T g|``, so the best decrease is ``1 / (2 gauge^2)``: a smaller
gauge is better, whatever the length of ``D``. The natural gradient ``F^-1 g`` has the smallest one,
``(g^T F^-1 g)^(-1/2)``. The gauge compares directions, and with them dampings, window sizes and
ways to store gradients, from a few batches instead of whole trainings.

Reference: Wu, Yu, Zhang, Woodland, "An Improved Empirical Fisher Approximation for Natural Gradient
Descent", NeurIPS 2024 (arXiv 2406.06420), section 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mfac_jax._layout import Layout, PyTree


class Gauge(NamedTuple):
    """What a direction can do; see :func:`gauge`.

    Attributes:
        gauge: ``sqrt(D^T F D) / |D^T g|``; smaller is better; infinite if ``D^T g`` is 0. Scalar.
        slope: ``D^T g``, the decrease of the loss per unit step along ``-D``; scalar.
        curvature: ``D^T F D``; scalar.
        best_step: ``D^T g / D^T F D``, the step with the best decrease; negative if ``-D`` goes
            uphill; 0 if ``D^T g`` is 0. Scalar.
        best_decrease: ``(D^T g)^2 / (2 D^T F D)``, in units of the loss; 0 if ``D^T g`` is 0.
            Scalar.
    """

    gauge: Float[Array, ""]
    slope: Float[Array, ""]
    curvature: Float[Array, ""]
    best_step: Float[Array, ""]
    best_decrease: Float[Array, ""]


def gauge(
    outputs_fn: Callable[[PyTree], PyTree],
    loss_fn: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    direction: PyTree,
) -> Gauge:
    """Measures how far a step against ``direction`` can reduce the loss.

    The loss is ``loss_fn(outputs_fn(params))``. ``F`` is its Gauss-Newton matrix: ``J^T H J`` with
    the Jacobian ``J`` of the outputs and the Hessian ``H`` of ``loss_fn``. If the outputs are
    logits and the loss is a cross-entropy, or the outputs are means and the loss is a sum of
    squares, this is the true Fisher matrix. It takes one JVP of ``outputs_fn`` and no backward
    pass. The function can be jitted, and mapped over directions by ``jax.vmap``.

    Args:
        outputs_fn: the outputs of the network, for example logits (batch, classes), as a function
            of the parameters. It holds the batch.
        loss_fn: the loss as a function of the outputs; convex in them.
        params: the parameters at which to measure.
        direction: ``D``, a tree like the parameters: what an optimizer would subtract, up to
            length.

    Returns:
        The gauge, with the slope and the curvature it is made of.

    Raises:
        ValueError: ``direction`` does not have the structure or the shapes of the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax.gauge import gauge
        >>> scales = jnp.array([1.0, 10.0])
        >>> outputs = lambda w: scales * w
        >>> loss = lambda z: 0.5 * jnp.sum(z**2)
        >>> w = jnp.array([1.0, 1.0])
        >>> gradient = scales**2 * w
        >>> float(gauge(outputs, loss, w, gradient).gauge) > float(gauge(outputs, loss, w, w).gauge)
        True
        >>> gauge(outputs, loss, w, w).best_decrease  # the whole loss: w is the Newton direction
        Array(50.5, dtype=float32)
    """
    leaves = Layout(params).check(direction, "direction")
    pairs = zip(jax.tree.leaves(params), leaves, strict=True)
    size = _largest(leaves)
    cast = [_over(x, size).astype(jnp.result_type(leaf)) for leaf, x in pairs]
    tangent = jax.tree.unflatten(jax.tree.structure(params), cast)
    outputs, change = jax.jvp(outputs_fn, (params,), (tangent,))
    slopes, bent = jax.jvp(jax.grad(loss_fn), (outputs,), (change,))
    slope, curvature = _inner(change, slopes), jnp.maximum(_inner(change, bent), 0)
    is_level = slope == 0
    step = jnp.where(is_level, 0, slope / curvature)
    return Gauge(
        gauge=jnp.where(is_level, jnp.inf, jnp.sqrt(curvature) / jnp.abs(slope)),
        slope=slope * size,
        curvature=curvature * size**2,
        best_step=step / size,
        best_decrease=step * slope / 2,
    )


def _over(x: Any, size: Float[Array, ""]) -> Array:
    """A quotient in float32 at least."""
    wide = np.promote_types(jnp.result_type(x), np.float32)
    return jnp.asarray(x).astype(wide) / size.astype(wide)


def _largest(leaves: Sequence[Any]) -> Float[Array, ""]:
    """The largest magnitude of all entries; 1 if they are all 0."""
    sizes = [jnp.max(jnp.abs(jnp.asarray(x).astype(jnp.float32))) for x in leaves if jnp.size(x)]
    size = functools.reduce(jnp.maximum, sizes, jnp.zeros((), jnp.float32))
    return jnp.where(size > 0, size, 1)


def _inner(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The inner product of two trees, accumulated in float32 at least."""
    total = jnp.zeros((), jnp.float32)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        wide = np.promote_types(jnp.result_type(x), np.float32)
        total = total.astype(np.promote_types(total.dtype, wide)) + jnp.sum(
            x.astype(wide) * y.astype(wide)
        )
    return total
