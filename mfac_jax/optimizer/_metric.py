"""The metric of a window: the positive diagonal ``D`` in ``F = lambda D + G^T G / n``.

With rows ``h = D^-1/2 g`` the algebra is that of ``D = I``:

    F^-1 G^T a = D^-1/2 (lambda I + H^T H / n)^-1 H^T a

A row keeps the ``D`` of the step in which it was pushed; the result is scaled by the ``D`` of the
current step. With ``D = sqrt(second moments)`` and a large damping the direction is Adam's. With a
small damping the window adds the curvature between parameters, which a diagonal cannot see.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mfac_jax import _checks
from mfac_jax._layout import Layout, PyTree


class Metric(abc.ABC):
    """A diagonal ``D`` and how it follows the gradients; a small immutable value."""

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The state for these parameters: any tree of arrays."""

    @abc.abstractmethod
    def update(self, state: PyTree, gradient: PyTree) -> PyTree:
        """The state after a gradient. If the window rejects the gradient, the result is dropped.

        Args:
            state: the state.
            gradient: a tree like the parameters.
        """

    @abc.abstractmethod
    def scale(self, state: PyTree) -> PyTree:
        """``D^-1/2``, a tree like the parameters."""


class SecondMomentsState(NamedTuple):
    """State of :class:`SecondMoments`.

    Attributes:
        nu: the decayed sum of squared gradients, not yet corrected for its start at zero; a tree
            like the parameters, float32 at least.
        steps: the number of gradients in it; scalar int32.
    """

    nu: PyTree
    steps: Int[Array, ""]


@dataclass(frozen=True)
class SecondMoments(Metric):
    """``D = sqrt(nu) + eps`` with ``nu`` the bias-corrected second moments, as in Adam.

    Attributes:
        decay: Adam's ``b2``; in [0, 1).
        eps: Adam's ``eps``; above 0.

    Raises:
        TypeError: an attribute is not a number.
        ValueError: an attribute has an impossible value.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax.optimizer import SecondMoments, mfac_precondition
        >>> tx = mfac_precondition(8, metric=SecondMoments(), relative_damping=1e4)
        >>> gradient = jnp.array([100.0, -0.01])
        >>> direction, _ = tx.update(gradient, tx.init(gradient))
        >>> (jnp.abs(direction) / direction[0]).round(3)  # of one size, as in Adam's first step
        Array([1., 1.], dtype=float32)

    Reference: Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """

    decay: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _checks.static_decay(self.decay, "decay")
        _checks.positive_scalar(self.eps, "eps")

    def init(self, params: PyTree) -> SecondMomentsState:
        return SecondMomentsState(jax.tree.map(_wide_zeros, params), jnp.zeros((), jnp.int32))

    def update(self, state: SecondMomentsState, gradient: PyTree) -> SecondMomentsState:
        def step(nu: Array, g: Array) -> Array:
            return self.decay * nu + (1 - self.decay) * jnp.square(g.astype(nu.dtype))

        leaves, treedef = jax.tree.flatten(state.nu)
        moved = [step(nu, g) for nu, g in zip(leaves, jax.tree.leaves(gradient), strict=True)]
        return SecondMomentsState(jax.tree.unflatten(treedef, moved), state.steps + 1)

    def scale(self, state: SecondMomentsState) -> PyTree:
        def of_leaf(nu: Array) -> Array:
            seen = 1 - jnp.asarray(self.decay, nu.dtype) ** state.steps.astype(nu.dtype)
            # Before the first accepted gradient all moments are 0.
            mean = nu / jnp.where(state.steps > 0, seen, jnp.ones_like(seen))
            return jax.lax.rsqrt(jnp.sqrt(mean) + self.eps)

        return jax.tree.map(of_leaf, state.nu)


@dataclass(frozen=True, eq=False)
class Diagonal(Metric):
    """A diagonal ``D`` that the caller gives and that does not change.

    Attributes:
        values: ``D``, a tree like the parameters, or with scalars for whole leaves; positive. Under
            ``optax.masked`` and ``optax.partition`` it may be the tree of all parameters.

    Raises:
        TypeError: a leaf is not real floating point.
        ValueError: an entry is not positive; or, in ``init``, ``values`` do not fit the parameters.
    """

    values: PyTree

    def __post_init__(self) -> None:
        Layout(self.values, "values")
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.values):
            is_known = not isinstance(leaf, jax.core.Tracer)
            if is_known and not bool(jnp.all(jnp.asarray(leaf) > 0)):
                where = f"values{jax.tree_util.keystr(path)}"
                raise ValueError(f"{where} must be positive, got {jnp.min(jnp.asarray(leaf))}.")

    def init(self, params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # a placeholder, from optax.tree.map_params
            return params
        known = dict(zip(Layout(self.values).paths, jax.tree.leaves(self.values), strict=True))
        roots = []
        for path, leaf in zip(Layout(params).paths, leaves, strict=True):
            if path not in known:
                raise ValueError(f"values{path} is missing: values has only {sorted(known)}.")
            value = jnp.asarray(known[path])
            if value.shape not in ((), jnp.shape(leaf)):
                raise ValueError(
                    f"values{path} has the wrong shape: expected {jnp.shape(leaf)} or (), "
                    f"got {value.shape}."
                )
            wide = _wide_zeros(leaf)
            roots.append(jax.lax.rsqrt(value.astype(wide.dtype)) + wide)
        return jax.tree.unflatten(treedef, roots)

    def update(self, state: PyTree, gradient: PyTree) -> PyTree:
        del gradient
        return state

    def scale(self, state: PyTree) -> PyTree:
        return state


def _wide_zeros(leaf: Any) -> Array:
    """Zeros in float32 at least, with the sharding of the leaf."""
    return jnp.zeros_like(leaf, np.promote_types(jnp.result_type(leaf), np.float32))
