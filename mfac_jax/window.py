"""The dynamic algorithm: a sliding window of gradients and products with ``F^-1``.

The paper keeps a triangular recursion up to date and pays O(d m + m^3) for a
replaced gradient. Here the state holds ``K = G G^T`` beside the rows: a replaced
gradient costs one scan (``G g``, the new row and column of ``K``), damping enters
only when ``A = n lambda I + K`` is factored, and with ``n`` rows held

    F^-1 v      = (v - G^T A^-1 G v) / lambda        (:func:`ihvp`)
    F^-1 G^T a  = n G^T A^-1 a                       (:func:`ihvp_combination`)

The second has no subtraction, hence no cancellation; it is what the optimizer uses.

Slots are numbered 0 .. m-1. A push fills an empty slot if there is one and
otherwise replaces the oldest gradient. Empty slots are zero rows and never count.

Reference: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations
of Second-Order Information", NeurIPS 2021, section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mfac_jax import _checks, algebra, carried
from mfac_jax._layout import PyTree
from mfac_jax.rows import GradientRows, check_rows, empty_rows

_EMPTY = -1


class Window(NamedTuple):
    """The last gradients and their Gram matrix; immutable.

    Attributes:
        rows: ``G``, the gradients; ``m`` rows of ``d`` entries.
        gram: ``K = G G^T``; (m, m), zero in the rows and columns of empty slots.
        stamps: the order in which the slots were filled, -1 where empty; (m,) int32.
        rejected: gradients that were not taken in, being NaN, infinite or too large
            to square; scalar int32.
    """

    rows: GradientRows
    gram: Float[Array, "m m"]
    stamps: Int[Array, " m"]
    rejected: Int[Array, ""]


class PushInfo(NamedTuple):
    """What became of one gradient.

    Attributes:
        slot: where it was put; scalar int32.
        accepted: whether it was; false leaves the window as it was.
    """

    slot: Int[Array, ""]
    accepted: Bool[Array, ""]


def init(
    params: PyTree,
    window_size: int,
    *,
    storage: str = "flat",
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Window:
    """An empty window for gradients of ``params``.

    Args:
        params: the parameters, or anything with their shapes and dtypes.
        window_size: ``m``, any number of gradients from 1 up.
        storage: ``"flat"`` or ``"per_leaf"``; see :func:`mfac_jax.rows.empty_rows`.
        dtype: what the gradients are stored in.
        implementation: of the scans, by name; by default the best on each platform. See
            :mod:`mfac_jax.kernels`.

    Returns:
        The window: ``m d`` entries of ``dtype`` and ``m^2`` of the accumulation dtype.

    Raises:
        TypeError: ``window_size`` is not an int, or a leaf is not real floating point.
        ValueError: ``window_size`` is below 1, or ``storage`` or ``implementation`` is
            unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import window
        >>> w = window.init(jnp.zeros(3), window_size=2)
        >>> w, info = window.push(w, jnp.array([1.0, 0.0, 0.0]))
        >>> window.ihvp(w, jnp.ones(3), damping=1.0)
        Array([0.5, 1. , 1. ], dtype=float32)
    """
    m = _checks.positive_int(window_size, "window_size")
    rows = empty_rows(params, m, storage=storage, dtype=dtype, implementation=implementation)
    return Window(
        rows=rows,
        gram=jnp.zeros((m, m), rows.dtype),
        stamps=jnp.full((m,), _EMPTY, jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
    )


def from_rows(rows: GradientRows) -> Window:
    """A full window of gradients that exist already; row 0 is the oldest. O(d m^2).

    Raises:
        TypeError: ``rows`` are not gradient rows.
    """
    check_rows(rows)
    return Window(
        rows=rows,
        gram=rows.gram(),
        stamps=jnp.arange(rows.num_rows, dtype=jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
    )


def num_held(window: Window) -> Int[Array, ""]:
    """``n``: the number of gradients in the window."""
    return jnp.sum(window.stamps != _EMPTY, dtype=jnp.int32)


def newest_slot(window: Window) -> Int[Array, ""]:
    """The slot of the gradient that came last (0 for an empty window)."""
    return jnp.argmax(window.stamps).astype(jnp.int32)


def push(window: Window, gradient: PyTree) -> tuple[Window, PushInfo]:
    """Takes a gradient in, in place of the oldest if the window is full. O(d m).

    A gradient that is not finite, or too large for sums of squared norms over the
    window to be, leaves the window as it was but for the count in ``rejected``.

    Args:
        window: the window.
        gradient: a tree with the structure of the parameters.

    Returns:
        The new window and what was done; fit for ``lax.scan``.

    Raises:
        ValueError: the gradient's structure or a shape differs; both are shown.
        TypeError: a leaf is not real floating point.
    """
    slot = jnp.argmin(window.stamps).astype(jnp.int32)
    stamp = jnp.max(window.stamps) + 1
    return _write(window, slot, gradient, stamp)


def replace(window: Window, slot: ArrayLike, gradient: PyTree) -> tuple[Window, PushInfo]:
    """Puts a gradient in the place, and the age, of the one in ``slot``. O(d m).

    An empty slot takes the gradient as a push would, as the newest.

    Args:
        window: the window.
        slot: which; 0 .. m-1.
        gradient: a tree with the structure of the parameters.

    Returns:
        The new window and what was done.

    Raises:
        ValueError: ``slot`` is out of range, or the gradient does not fit. A traced
            slot out of range rejects the gradient.
        TypeError: ``slot`` is not an integer.
    """
    m = window.rows.num_rows
    slot, inside = _slot(slot, m)
    window.rows.layout.check(gradient, "gradient")
    refused = jax.tree.map(lambda g: jnp.where(inside, g, jnp.full_like(g, jnp.nan)), gradient)
    slot = jnp.clip(slot, 0, m - 1)
    held = window.stamps[slot]
    stamp = jnp.where(held == _EMPTY, jnp.max(window.stamps) + 1, held)
    return _write(window, slot, refused, stamp)


def remove(window: Window, slot: ArrayLike) -> Window:
    """Takes the gradient in ``slot`` out; nothing happens if there is none. O(d).

    Args:
        window: the window.
        slot: which; 0 .. m-1.

    Returns:
        The window with an empty slot, which the next push fills.

    Raises:
        ValueError: ``slot`` is out of range. A traced slot out of range removes nothing.
        TypeError: ``slot`` is not an integer.
    """
    slot, inside = _slot(slot, window.rows.num_rows)
    slot = jnp.where(inside, slot, window.rows.num_rows)  # out of range: dropped
    return window._replace(
        rows=window.rows.clear(slot),
        gram=window.gram.at[slot].set(0).at[:, slot].set(0),
        stamps=window.stamps.at[slot].set(_EMPTY),
    )


def restrict(window: Window, mask: PyTree) -> Window:
    """Sets the gradients to zero where ``mask`` is false. O(d m^2), for a changed mask.

    Args:
        window: the window.
        mask: a tree of booleans with the structure of the parameters; true is kept.

    Returns:
        The window of the restricted gradients.
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

    In float32 the part of ``v`` inside the span of the gradients loses about
    ``eps |g|^2 / lambda`` to cancellation; for a combination of the window's own
    gradients use :func:`ihvp_combination`.

    Args:
        window: the window.
        vector: ``v``, a tree like the parameters or one flat vector (d,).
        damping: ``lambda > 0``; a number or a scalar array.
        denominator: what the sum of outer products is divided by; the number of
            gradients held by default.

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
    return layout.like(_or_smaller_side(out, window, tree, lam, n, factor), vector)


def ihvp_combination(
    window: Window,
    coefficients: Float[ArrayLike, " m"],
    damping: ArrayLike,
    *,
    denominator: ArrayLike | None = None,
    refinements: int = 0,
) -> PyTree:
    """``F^-1 G^T a = n G^T A^-1 a``: a combination of the window's own gradients.

    O(d m + m^3), one scan, no cancellation. Gradients that are equal share their
    coefficient (:func:`mfac_jax.algebra.share_between_equal_rows`).

    Args:
        window: the window.
        coefficients: ``a``; (m,), one a slot.
        damping: ``lambda > 0``; a number or a scalar array.
        denominator: as in :func:`ihvp`.
        refinements: steps of iterative refinement, two scans each. They gain where
            gradients are nearly dependent and the damping is small, see the accuracy
            page of the documentation.

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
        shared = algebra.share_between_equal_rows(window.gram, rhs)
        solved = algebra.refined_solve(factor, window.gram, n * lam, shared)
        return algebra.share_between_equal_rows(window.gram, solved)

    a = algebra.share_between_equal_rows(window.gram, jnp.asarray(coefficients, rows.dtype))
    c = solve(a)
    out = rows.combine(n * c)
    for _ in range(steps):
        correction = solve(a - n * lam * c - rows.dots(out) / n)
        c += correction
        out = jax.tree.map(jnp.add, out, rows.combine(n * correction))
    return _or_smaller_side(out, window, rows.combine(a), lam, n, factor)


def ihvp_newest(
    window: Window,
    damping: ArrayLike,
    *,
    denominator: ArrayLike | None = None,
    refinements: int = 0,
) -> PyTree:
    """``F^-1 g`` for the gradient that came last; zero for an empty window.

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


def ihvp_newest_carried(
    window: Window,
    damping: ArrayLike,
    inverse: carried.CarriedInverse,
    *,
    denominator: ArrayLike | None = None,
) -> tuple[PyTree, carried.CarriedInverse]:
    """:func:`ihvp_newest` in O(d m + m^2), with the inverse of ``A`` from the step before.

    For a float32 window of fewer gradients than parameters that takes one gradient between
    two calls, under a damping that changes slowly. After anything else the inverse is made
    anew, O(m^3), and the result is as good. See :mod:`mfac_jax.carried`.

    Args:
        window: the window.
        damping: as in :func:`ihvp_combination`.
        inverse: what the last call returned; :func:`mfac_jax.carried.empty` at first.
        denominator: as in :func:`ihvp`.

    Returns:
        ``F^-1 g`` for the gradient that came last, and the inverse for the next call.

    Raises:
        ValueError: ``damping`` is not positive, or the inverse has another size or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import carried, window
        >>> w, _ = window.push(window.init(jnp.zeros(3), 2), jnp.array([1.0, 0.0, 0.0]))
        >>> direction, inverse = window.ihvp_newest_carried(w, 1.0, carried.empty(2))
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
    coefficients, inverse = carried.newest(inverse, gram, newest_slot(window), n * lam)
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


def _slot(slot: ArrayLike, m: int) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The slot, and whether there is such a one, which a traced slot does not tell before."""
    _checks.index(slot, "slot", m)
    if np.shape(slot) != ():
        raise ValueError(f"slot must be one slot, got an array of shape {np.shape(slot)}.")
    slot = jnp.asarray(slot, jnp.int32)
    return slot, (slot >= 0) & (slot < m)


def _or_smaller_side(
    out: PyTree,
    window: Window,
    tree: PyTree,
    lam: Float[Array, ""],
    n: Float[Array, ""],
    factor: algebra.Factor,
) -> PyTree:
    """``F^-1 v`` from ``F`` itself in place of ``out`` if d <= m and ``F`` is less singular.

    Once d gradients are held, ``K`` has rank d < m and ``A`` is as ill-conditioned as
    ``|g|^2 / lambda``. ``F`` need not be, but is where gradients differ much in size.
    """
    rows, layout = window.rows, window.rows.layout
    if not 0 < layout.size <= rows.num_rows:
        return out
    gradients = rows.columns(0, layout.size)
    fisher = jnp.dot(gradients.T, gradients, precision="highest") / n
    own_factor = algebra.factor(fisher, lam)
    vector = layout.flatten(tree, rows.dtype, "vector")
    small = layout.unflatten(algebra.refined_solve(own_factor, fisher, lam, vector))
    better = algebra.smallest_pivot(own_factor) > algebra.smallest_pivot(factor)
    return jax.tree.map(lambda x, y: jnp.where(better, x, y), small, out)


def _damping(window: Window, damping: ArrayLike) -> Float[Array, ""]:
    _checks.positive_scalar(damping, "damping")
    return jnp.asarray(damping).astype(window.rows.dtype)


def _denominator(window: Window, denominator: ArrayLike | None) -> Float[Array, ""]:
    if denominator is None:
        return jnp.maximum(num_held(window), 1).astype(window.rows.dtype)
    _checks.positive_scalar(denominator, "denominator")
    return jnp.asarray(denominator).astype(window.rows.dtype)
