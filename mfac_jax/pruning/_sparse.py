"""Training under a mask, with any optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mfac_jax import window
from mfac_jax._layout import Layout, PyTree, where
from mfac_jax.pruning._masks import initial_mask


class SparseState(NamedTuple):
    """State of :func:`sparse`.

    Attributes:
        mask: a tree of booleans like the parameters, true where a weight is alive.
        inner_state: the state of the wrapped optimizer.
    """

    mask: PyTree
    inner_state: optax.OptState


def sparse(
    inner: optax.GradientTransformation, mask: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Trains with ``inner`` and keeps pruned weights at zero.

    Gradients are masked before ``inner`` sees them. The update of a pruned weight sets the
    weight to 0, so momentum, weight decay or noise cannot revive it. The mask is part of the
    state. It is saved with the state, and :func:`set_mask` changes it without a new compilation.
    Wrap the whole chain, not a part of it.

    Args:
        inner: any optimizer, such as :func:`mfac_jax.mfac`.
        mask: initial mask, a tree of booleans like the parameters; everything is alive by
            default.

    Returns:
        The optimizer; its ``update`` needs the parameters.

    Raises:
        TypeError: the mask is not boolean (from ``init``).
        ValueError: the mask does not fit the parameters (from ``init``), or ``update`` is
            called without the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from mfac_jax.pruning import sparse
        >>> tx = sparse(optax.sgd(0.1, momentum=0.9), jnp.array([True, False]))
        >>> params = jnp.array([1.0, 0.0])
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.array([1.0, 1.0]), state, params)
        >>> optax.apply_updates(params, updates)
        Array([0.9, 0. ], dtype=float32)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SparseState:
        return SparseState(_mask_like(params, mask), inner.init(params))

    def update(
        updates: optax.Updates,
        state: SparseState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SparseState]:
        if params is None:
            raise ValueError("sparse needs the parameters: update(updates, state, params).")
        gradients = where(state.mask, updates)
        updates, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
        updates = jax.tree.map(_where_alive, state.mask, updates, params)
        return updates, SparseState(state.mask, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def set_mask(state: PyTree, mask: PyTree) -> PyTree:
    """Sets a new mask in the optimizer's state, after a pruning step.

    The windows of gradients of :func:`mfac_jax.mfac_precondition` are restricted to the new mask,
    so pruned weights leave the Fisher. A window may hold only some of the parameters
    (``optax.masked``, ``optax.multi_transform``).

    Args:
        state: the state of :func:`sparse`, or a state that contains such states.
        mask: a tree of booleans like the parameters.

    Returns:
        The new state.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: ``state`` contains no state of :func:`sparse`, or the mask does not fit the
            old mask or a window.
    """
    found = []

    def is_window(part: Any) -> bool:
        return isinstance(part, window.Window)

    def replace(part: Any) -> Any:
        if not isinstance(part, SparseState):
            return part
        found.append(part)
        new = _mask_like(part.mask, mask)

        def of_window(part: Any) -> Any:
            return _restrict(part, new) if is_window(part) else part

        return SparseState(new, jax.tree.map(of_window, part.inner_state, is_leaf=is_window))

    new_state = jax.tree.map(replace, state, is_leaf=lambda part: isinstance(part, SparseState))
    if not found:
        raise ValueError(
            f"state must hold a state of mfac_jax.pruning.sparse, got {jax.tree.structure(state)}."
        )
    return new_state


def _restrict(held: window.Window, mask: PyTree) -> window.Window:
    """Restricts a window, of some or all parameters, to the mask of all parameters."""
    of_path = dict(zip(_layout_of(mask).paths, jax.tree.leaves(mask), strict=True))
    layout = held.rows.layout
    strange = [path for path in layout.paths if path not in of_path]
    if strange:
        raise ValueError(
            f"a window of gradients in the state has the leaf {strange[0]}, which the mask "
            f"lacks: expected some of {', '.join(of_path)}."
        )
    own = [of_path[path] for path in layout.paths]
    return window.restrict(held, jax.tree.unflatten(layout.treedef, own))


def _layout_of(tree: PyTree) -> Layout:
    """The layout of parameters with the structure and shapes of ``tree``, which has any dtypes."""
    return Layout(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32), tree)
    )


def _mask_like(params: PyTree, mask: PyTree | None) -> PyTree:
    """``mask`` in the structure of ``params``, every leaf in full."""
    leaves = _layout_of(params).check_mask(initial_mask(params) if mask is None else mask)
    return jax.tree.unflatten(jax.tree.structure(params), [jnp.array(leaf) for leaf in leaves])


def _where_alive(mask: Array, update: Array, weight: Array) -> Array:
    """The update; ``-w`` for a pruned weight, in a dtype that holds it exactly."""
    dtype = np.promote_types(update.dtype, jnp.asarray(weight).dtype)
    return jnp.where(mask, update.astype(dtype), -jnp.asarray(weight).astype(dtype))
