"""The dynamic algorithm: a sliding window of gradients and products with ``F^-1``.

The paper updates a triangular recursion, and a replaced gradient costs O(d m + m^3). Here
the state holds ``K = G G^T`` beside the rows. A replaced gradient costs one scan, which computes
``G g``, the new row and column of ``K``. Damping enters only when ``A = n lambda I + K`` is
factored. If the window holds ``n`` gradients,

    F^-1 v      = (v - G^T A^-1 G v) / lambda        (:func:`ihvp`)
    F^-1 G^T a  = n G^T A^-1 a                       (:func:`ihvp_combination`)

The second formula has no subtraction and therefore no cancellation. The optimizer uses it.

Slots are numbered 0 .. m-1. A push fills an empty slot if there is one and replaces the oldest
gradient otherwise. Empty slots are rows of zeros, and ``n`` does not count them.

Reference: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of
Second-Order Information", NeurIPS 2021, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks, algebra, incremental
from mfac_jax._layout import PyTree
from mfac_jax.rows import Dense, Storage, WritableRows
from mfac_jax.rows._base import check_products, check_writable
from mfac_jax.rows._room import require_room
from mfac_jax.rows._storage import check_storage

_EMPTY = -1


class Window(NamedTuple):
    """The most recent gradients and their Gram matrix; immutable.

    Attributes:
        rows: ``G``, the gradients; ``m`` rows of ``d`` entries.
        gram: ``K = G G^T``; (m, m), zero in the rows and columns of empty slots.
        stamps: the order in which the slots were filled, -1 where a slot is empty; (m,) int32.
        rejected: the number of gradients that the window has rejected because they held NaN or
            Inf or were too large to square; scalar int32.
    """

    rows: WritableRows
    gram: Float[Array, "m m"]
    stamps: Int[Array, " m"]
    rejected: Int[Array, ""]


class PushInfo(NamedTuple):
    """What the window did with one gradient.

    Attributes:
        slot: the slot of the gradient; scalar int32.
        accepted: whether the window stored the gradient; if not, its gradients are unchanged.
            Scalar bool.
    """

    slot: Int[Array, ""]
    accepted: Bool[Array, ""]


def init(
    params: PyTree,
    window_size: int,
    *,
    storage: Storage = Dense(),  # noqa: B008  (immutable)
) -> Window:
    """An empty window for gradients of ``params``.

    Args:
        params: the parameters, or anything with their shapes and dtypes.
        window_size: ``m``, the number of gradients in a full window; at least 1.
        storage: how gradients are stored; see :class:`mfac_jax.rows.Dense`.

    Returns:
        The window: ``m`` rows, and ``m^2`` entries in the accumulation dtype.

    Raises:
        TypeError: ``window_size`` is not an int, ``storage`` is not a storage, or a leaf is
            not real floating point.
        ValueError: ``window_size`` is below 1.
        MemoryError: the window cannot fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import window
        >>> w = window.init(jnp.zeros(3), window_size=2)
        >>> w, info = window.push(w, jnp.array([1.0, 0.0, 0.0]))
        >>> window.ihvp(w, jnp.ones(3), damping=1.0)
        Array([0.5, 1. , 1. ], dtype=float32)
    """
    m = _checks.positive_int(window_size, "window_size")
    check_storage(storage)
    require_room(storage, params, m, "window_size", gram=True, step=True)
    rows = storage.empty(params, m)
    check_products(check_writable(rows, "a window"), "a window")
    return Window(
        rows=rows,
        gram=jnp.zeros((m, m), rows.dtype),
        stamps=jnp.full((m,), _EMPTY, jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
    )


def from_rows(rows: WritableRows) -> Window:
    """A full window of existing gradients. O(d m^2).

    Args:
        rows: the gradients, the oldest first.

    Returns:
        The window. It holds ``rows`` without a copy.

    Raises:
        TypeError: ``rows`` are not gradient rows, or cannot be written.
    """
    check_writable(rows, "a window")
    return Window(
        rows=rows,
        gram=rows.gram(),
        stamps=jnp.arange(rows.num_rows, dtype=jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
    )


def num_held(window: Window) -> Int[Array, ""]:
    """``n``: the number of gradients in the window; scalar int32."""
    return jnp.sum(window.stamps != _EMPTY, dtype=jnp.int32)


def newest_slot(window: Window) -> Int[Array, ""]:
    """The slot of the newest gradient; 0 for an empty window. Scalar int32."""
    return jnp.argmax(window.stamps).astype(jnp.int32)


def push(window: Window, gradient: PyTree) -> tuple[Window, PushInfo]:
    """Adds a gradient, which replaces the oldest one if the window is full. O(d m).

    A gradient is rejected if it has NaN or Inf in it, or if it is so large that the sum of
    squared norms over the window could overflow. Then only the count ``rejected`` changes.

    Args:
        window: the window.
        gradient: a tree with the structure of the parameters.

    Returns:
        The new window, and what it did with the gradient. ``push`` can be the body of a
        ``lax.scan``.

    Raises:
        ValueError: the gradient's structure or a shape differs; both are shown.
        TypeError: a leaf is not real floating point.
    """
    slot = jnp.argmin(window.stamps).astype(jnp.int32)
    stamp = jnp.max(window.stamps) + 1
    return _write(window, slot, gradient, stamp)


def replace(window: Window, slot: ArrayLike, gradient: PyTree) -> tuple[Window, PushInfo]:
    """Replaces the gradient in ``slot``; the new gradient has the age of the old one. O(d m).

    In an empty slot the new gradient becomes the newest one, as after a push.

    Args:
        window: the window.
        slot: the slot, 0 .. m-1.
        gradient: a tree with the structure of the parameters.

    Returns:
        The new window, and what it did with the gradient.

    Raises:
        ValueError: ``slot`` is out of range, or the gradient does not fit. If a traced slot
            is out of range, there is no error, and the gradient is rejected.
        TypeError: ``slot`` is not an integer.
    """
    m = window.rows.num_rows
    slot, exists = _checked_slot(slot, m)
    window.rows.layout.check(gradient, "gradient")
    gradient = jax.tree.map(lambda g: jnp.where(exists, g, jnp.full_like(g, jnp.nan)), gradient)
    slot = jnp.clip(slot, 0, m - 1)
    held = window.stamps[slot]
    stamp = jnp.where(held == _EMPTY, jnp.max(window.stamps) + 1, held)
    return _write(window, slot, gradient, stamp)


def remove(window: Window, slot: ArrayLike) -> Window:
    """Removes the gradient in ``slot``, if there is one. O(d).

    Args:
        window: the window.
        slot: the slot, 0 .. m-1.

    Returns:
        The window with an empty slot, which the next push fills.

    Raises:
        ValueError: ``slot`` is out of range. If a traced slot is out of range, there is no
            error, and nothing is removed.
        TypeError: ``slot`` is not an integer.
    """
    slot, exists = _checked_slot(slot, window.rows.num_rows)
    slot = jnp.where(exists, slot, window.rows.num_rows)  # JAX drops updates out of range.
    return window._replace(
        rows=window.rows.clear(slot),
        gram=window.gram.at[slot].set(0).at[:, slot].set(0),
        stamps=window.stamps.at[slot].set(_EMPTY),
    )


def restrict(window: Window, mask: PyTree) -> Window:
    """Sets the gradients to zero where ``mask`` is false. O(d m^2).

    Args:
        window: the window.
        mask: a tree of booleans with the structure of the parameters.

    Returns:
        The window of the restricted gradients.

    Raises:
        ValueError: the structure or a shape of ``mask`` differs.
        TypeError: a leaf of ``mask`` is not boolean.
    """
    rows = window.rows.restrict(mask)
    return window._replace(rows=rows, gram=rows.gram())


def fisher_trace(window: Window) -> Float[Array, ""]:
    """``trace(K) / n``: the trace of the undamped Fisher, the mean of ``|g_i|^2``."""
    n = jnp.maximum(num_held(window), 1).astype(window.gram.dtype)
    return jnp.trace(window.gram) / n


def ihvp(
    window: Window,
    vector: PyTree,
    damping: ArrayLike,
    *,
    denominator: ArrayLike | None = None,
) -> PyTree:
    """``F^-1 v = (v - G^T A^-1 G v) / lambda`` for any ``v``. O(d m + m^3).

    In float32 the part of ``v`` in the span of the gradients loses about
    ``eps |g|^2 / lambda`` to cancellation. For a combination of the window's own gradients
    use :func:`ihvp_combination`.

    Args:
        window: the window.
        vector: ``v``, a tree like the parameters or one flat vector (d,).
        damping: ``lambda > 0``; a number or a scalar array.
        denominator: the divisor of the sum of outer products; by default the number of
            gradients held.

    Returns:
        ``F^-1 v`` in the form and the dtypes of ``vector``.

    Raises:
        ValueError: ``damping`` is not positive, or ``vector`` does not fit.
    """
    rows, layout = window.rows, window.rows.layout
    lam, n = _damping(window, damping), _denominator(window, denominator)
    tree = layout.as_tree(vector, "vector")
    factor = algebra.factor(window.gram, n * lam)
    solved = algebra.refined_solve(factor, window.gram, n * lam, rows.dots(tree))
    out = rows.combine(solved, vector=tree, scale=1 / lam)
    return layout.like(_better_conditioned(out, window, lambda: tree, lam, n, factor), vector)


def ihvp_combination(
    window: Window,
    coefficients: Float[ArrayLike, " m"],
    damping: ArrayLike,
    *,
    denominator: ArrayLike | None = None,
    refinements: int = 0,
) -> PyTree:
    """``F^-1 G^T a = n G^T A^-1 a``: a combination of the window's own gradients.

    O(d m + m^3), with one scan and no cancellation. Equal gradients share their coefficients
    (:func:`mfac_jax.algebra.share_between_equal_rows`).

    Args:
        window: the window.
        coefficients: ``a``; (m,), one for each slot.
        damping: ``lambda > 0``; a number or a scalar array.
        denominator: as in :func:`ihvp`.
        refinements: steps of iterative refinement, two scans each. They help if gradients are
            nearly dependent and the damping is small; see the page "Accuracy" of the
            documentation.

    Returns:
        ``F^-1 G^T a``, a tree like the parameters in the accumulation dtype of the
        rows (float32 at least).

    Raises:
        ValueError: ``damping`` is not positive, ``coefficients`` are not (m,), or
            ``refinements`` is negative.
    """
    rows = window.rows
    steps = _checks.non_negative_int(refinements, "refinements")
    if np.shape(coefficients) != (rows.num_rows,):
        raise ValueError(
            f"coefficients must have shape ({rows.num_rows},), one for each slot; "
            f"got {np.shape(coefficients)}."
        )
    lam, n = _damping(window, damping), _denominator(window, denominator)
    factor = algebra.factor(window.gram, n * lam)

    def solve(rhs: Array) -> Array:
        return algebra.shared_solve(factor, window.gram, n * lam, rhs)

    a = algebra.share_between_equal_rows(window.gram, jnp.asarray(coefficients, rows.dtype))
    c = solve(a)
    out = rows.combine(n * c)
    for _ in range(steps):
        correction = solve(a - n * lam * c - rows.dots(out) / n)
        c += correction
        out = jax.tree.map(jnp.add, out, rows.combine(n * correction))
    return _better_conditioned(out, window, lambda: rows.combine(a), lam, n, factor)


def ihvp_newest(
    window: Window,
    damping: ArrayLike,
    *,
    denominator: ArrayLike | None = None,
    refinements: int = 0,
) -> PyTree:
    """``F^-1 g`` for the newest gradient; zero for an empty window.

    The arguments are those of :func:`ihvp_combination`.
    """
    newest = jnp.arange(window.rows.num_rows, dtype=jnp.int32) == newest_slot(window)
    return ihvp_combination(
        window,
        newest.astype(window.rows.dtype),
        damping,
        denominator=denominator,
        refinements=refinements,
    )


def ihvp_newest_incremental(
    window: Window,
    damping: ArrayLike,
    inverse: incremental.IncrementalInverse,
    *,
    denominator: ArrayLike | None = None,
) -> tuple[PyTree, incremental.IncrementalInverse]:
    """:func:`ihvp_newest` in O(d m + m^2): updates the inverse of ``A`` of the last step.

    It needs a float32 window of fewer gradients than parameters. The cost is O(d m + m^2) if one
    gradient was pushed since the last call and the damping changed little. After any other
    change the inverse is rebuilt in O(m^3), and the result is equally exact. See
    :mod:`mfac_jax.incremental`.

    Args:
        window: the window.
        damping: as in :func:`ihvp_combination`.
        inverse: the inverse that the last call returned; :func:`mfac_jax.incremental.empty` in
            the first call.
        denominator: as in :func:`ihvp`.

    Returns:
        ``F^-1 g`` for the newest gradient, and the inverse for the next call.

    Raises:
        ValueError: ``damping`` is not positive, or the inverse has another size or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import incremental, window
        >>> w, _ = window.push(window.init(jnp.zeros(3), 2), jnp.array([1.0, 0.0, 0.0]))
        >>> direction, inverse = window.ihvp_newest_incremental(w, 1.0, incremental.empty(2))
        >>> direction
        Array([0.5, 0. , 0. ], dtype=float32)
    """
    gram, m = window.gram, window.rows.num_rows
    if inverse.matrix.shape != (m, m) or inverse.matrix.dtype != gram.dtype:
        raise ValueError(
            f"inverse must be that of a window of {m} gradients, {gram.dtype} of shape "
            f"({m}, {m}); got {inverse.matrix.dtype} of shape {inverse.matrix.shape}."
        )
    lam, n = _damping(window, damping), _denominator(window, denominator)
    coefficients, inverse = incremental.newest(inverse, gram, newest_slot(window), n * lam)
    return window.rows.combine(n * coefficients), inverse


def _write(
    window: Window, slot: Int[Array, ""], gradient: PyTree, stamp: Int[Array, ""]
) -> tuple[Window, PushInfo]:
    rows, dots, accepted = window.rows.put(slot, gradient)
    gram = window.gram.at[slot].set(dots).at[:, slot].set(dots)
    new = Window(
        rows=rows,
        gram=jnp.where(accepted, gram, window.gram),
        stamps=jnp.where(accepted, window.stamps.at[slot].set(stamp), window.stamps),
        rejected=window.rejected + (1 - accepted.astype(jnp.int32)),
    )
    return new, PushInfo(slot, accepted)


def _checked_slot(slot: ArrayLike, m: int) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The slot, and whether it exists. A traced slot out of range raises no error."""
    _checks.index(slot, "slot", m)
    if np.shape(slot) != ():
        raise ValueError(f"slot must be one slot, got an array of shape {np.shape(slot)}.")
    slot = jnp.asarray(slot, jnp.int32)
    return slot, (slot >= 0) & (slot < m)


def _better_conditioned(
    out: PyTree,
    window: Window,
    vector: Callable[[], PyTree],
    lam: Float[Array, ""],
    n: Float[Array, ""],
    factor: algebra.Factor,
) -> PyTree:
    """``F^-1 v``: ``out``, or the solution with ``F`` itself if ``F`` is better conditioned.

    Once the window holds d gradients, ``K`` has rank d. If d < m, the condition number of ``A``
    is then about ``|g|^2 / lambda``. The d x d matrix ``F`` may have a smaller one, but need not
    if the gradients differ much in size.
    """
    rows, layout = window.rows, window.rows.layout
    if not 0 < layout.size <= rows.num_rows:
        return out

    def column(unit: Float[Array, " d"]) -> Float[Array, " m"]:
        return rows.dots(layout.unflatten(unit))

    units = jnp.eye(layout.size, dtype=rows.dtype)
    columns: Float[Array, "d m"]
    columns = jax.vmap(column)(units) if rows.is_traceable else jnp.stack([*map(column, units)])
    fisher = jnp.dot(columns, columns.T, precision="highest") / n
    fisher_factor = algebra.factor(fisher, lam)
    rhs = layout.flatten(vector(), rows.dtype, "vector")
    solution = layout.unflatten(algebra.refined_solve(fisher_factor, fisher, lam, rhs))
    is_better = algebra.smallest_pivot(fisher_factor) > algebra.smallest_pivot(factor)
    return jax.tree.map(lambda x, y: jnp.where(is_better, x, y), solution, out)


def _damping(window: Window, damping: ArrayLike) -> Float[Array, ""]:
    _checks.positive_scalar(damping, "damping")
    return jnp.asarray(damping).astype(window.rows.dtype)


def _denominator(window: Window, denominator: ArrayLike | None) -> Float[Array, ""]:
    if denominator is None:
        return jnp.maximum(num_held(window), 1).astype(window.rows.dtype)
    _checks.positive_scalar(denominator, "denominator")
    return jnp.asarray(denominator).astype(window.rows.dtype)
