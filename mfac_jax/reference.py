"""The paper's own recursions, as an oracle for tests and a baseline for benchmarks.

The paper builds ``F^-1`` one gradient at a time by the Sherman-Morrison formula. With
``F_0 = lambda I``, ``h_i = F_{i-1}^-1 g_i`` and n gradients,

    F_i^-1 = F_{i-1}^-1 - h_i h_i^T / (n + g_i . h_i).

The static algorithm keeps the ``h_i``. The dynamic algorithm keeps the dot products
``g_i . g_j`` and expresses the ``h_i`` as combinations of gradients. Both take n steps, and each
step depends on the previous one. The rest of the library computes the same results by matrix
products (:mod:`mfac_jax.inverse`, :mod:`mfac_jax.window`). :func:`dense_fisher` is the matrix
``F`` itself.

All functions take plain ``(n, d)`` arrays and can be jitted.

Reference: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations
of Second-Order Information", NeurIPS 2021, sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mfac_jax import _checks
from mfac_jax.kernels._xla import accumulation_dtype

# The static recursion grows its array of h_i in this many stages, so that a step does not read
# rows that are still zero. All steps together then do 1/8 more work than necessary.
_STAGES = 8


class Recursion(NamedTuple):
    """The vectors of the static recursion.

    Attributes:
        vectors: ``h_i``; (n, d).
        scales: ``n + g_i . h_i``; (n,).
        damping: ``lambda``; scalar.
    """

    vectors: Float[Array, "n d"]
    scales: Float[Array, " n"]
    damping: Float[Array, ""]


class Coefficients(NamedTuple):
    """The vectors of the dynamic recursion, as combinations of the gradients.

    Attributes:
        lower: ``B`` with ``h_i = sum_j B_ij g_j``; (n, n), lower triangular.
        scales: ``n + D_ii`` with ``D_ij = h_i . g_j``; (n,).
        damping: ``lambda``; scalar.
    """

    lower: Float[Array, "n n"]
    scales: Float[Array, " n"]
    damping: Float[Array, ""]


def dense_fisher(gradients: Float[Array, "n d"], damping: ArrayLike) -> Float[Array, "d d"]:
    """``F = lambda I + G^T G / n`` as a dense matrix, for small d.

    Args:
        gradients: ``G``; (n, d).
        damping: ``lambda > 0``.

    Returns:
        The matrix; (d, d).

    Raises:
        ValueError: ``damping`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import reference
        >>> reference.dense_fisher(jnp.array([[2.0, 0.0]]), 1.0)
        Array([[5., 0.],
               [0., 1.]], dtype=float32)
    """
    gradients, lam = _wide(gradients, damping)
    n, d = gradients.shape
    outer = jnp.dot(gradients.T, gradients, precision="highest") / n
    return lam * jnp.eye(d, dtype=gradients.dtype) + outer


def static_recursion(gradients: Float[Array, "n d"], damping: ArrayLike) -> Recursion:
    """Computes the ``h_i`` one after another (section 3.1). O(d n^2), in n dependent steps.

        h_i = g_i / lambda - sum_{j < i} (h_j . g_i) / (n + g_j . h_j) h_j

    Args:
        gradients: ``G``; (n, d).
        damping: ``lambda > 0``.

    Returns:
        The recursion, for :func:`static_ihvp` and :func:`static_diagonal`.

    Raises:
        ValueError: ``damping`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from mfac_jax import reference
        >>> recursion = reference.static_recursion(jnp.array([[2.0, 0.0]]), 1.0)
        >>> reference.static_ihvp(recursion, jnp.array([1.0, 1.0]))
        Array([0.2, 1. ], dtype=float32)
    """
    gradients, lam = _wide(gradients, damping)
    n, d = gradients.shape
    vectors = jnp.zeros((0, d), gradients.dtype)
    scales = jnp.zeros((0,), gradients.dtype)

    def step(
        i: Int[Array, ""], carry: tuple[Float[Array, "k d"], Float[Array, " k"]]
    ) -> tuple[Float[Array, "k d"], Float[Array, " k"]]:
        vectors, scales = carry
        gradient = gradients[i]
        dots = jnp.dot(vectors, gradient, precision="highest")
        vector = gradient / lam - jnp.dot(dots / scales, vectors, precision="highest")
        scale = n + jnp.dot(gradient, vector, precision="highest")
        return vectors.at[i].set(vector), scales.at[i].set(scale)

    stage = -(-n // _STAGES)
    for start in range(0, n, stage):
        size = min(stage, n - start)
        # Vectors that are still zero add nothing to the sum, whatever their scale.
        vectors = jnp.concatenate([vectors, jnp.zeros((size, d), gradients.dtype)])
        scales = jnp.concatenate([scales, jnp.ones((size,), gradients.dtype)])
        vectors, scales = lax.fori_loop(start, start + size, step, (vectors, scales))
    return Recursion(vectors, scales, lam)


def static_ihvp(recursion: Recursion, vector: Float[Array, " d"]) -> Float[Array, " d"]:
    """``F^-1 v = v / lambda - sum_j (h_j . v) / (n + g_j . h_j) h_j``. O(d n).

    Args:
        recursion: the result of :func:`static_recursion`.
        vector: ``v``; (d,).

    Returns:
        ``F^-1 v``; (d,).
    """
    vector = vector.astype(recursion.vectors.dtype)
    dots = jnp.dot(recursion.vectors, vector, precision="highest")
    inside = jnp.dot(dots / recursion.scales, recursion.vectors, precision="highest")
    return vector / recursion.damping - inside


def static_diagonal(recursion: Recursion) -> Float[Array, " d"]:
    """``diag(F^-1) = 1 / lambda - sum_j h_j^2 / (n + g_j . h_j)``. O(d n).

    Args:
        recursion: the result of :func:`static_recursion`.

    Returns:
        The diagonal; (d,).
    """
    squares = recursion.vectors**2
    inside = jnp.dot(1 / recursion.scales, squares, precision="highest")
    return 1 / recursion.damping - inside


def dynamic_coefficients(dots: Float[Array, "n n"], damping: ArrayLike) -> Coefficients:
    """Computes the coefficients of the ``h_i`` from dot products (section 3.2). O(n^3).

        D_ij = (g_i . g_j) / lambda - sum_{k < i} D_ki D_kj / (n + D_kk)
        B_ij = delta_ij / lambda    - sum_{k < i} D_ki B_kj / (n + D_kk)

    Args:
        dots: ``g_i . g_j``; (n, n).
        damping: ``lambda > 0``.

    Returns:
        The coefficients, for :func:`dynamic_ihvp` and :func:`dynamic_direction`.

    Raises:
        ValueError: ``damping`` is not positive.
    """
    dots, lam = _wide(dots, damping)
    n = dots.shape[0]
    later = jnp.arange(n)

    def step(
        k: Int[Array, ""], carry: tuple[Float[Array, "n n"], Float[Array, "n n"]]
    ) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
        d_matrix, b_matrix = carry
        ratio = jnp.where(later > k, d_matrix[k] / (n + d_matrix[k, k]), jnp.zeros((), dots.dtype))
        return d_matrix - jnp.outer(ratio, d_matrix[k]), b_matrix - jnp.outer(ratio, b_matrix[k])

    start = (dots / lam, jnp.eye(n, dtype=dots.dtype) / lam)
    d_matrix, b_matrix = lax.fori_loop(0, n, step, start)
    return Coefficients(b_matrix, n + jnp.diagonal(d_matrix), lam)


def dynamic_ihvp(
    gradients: Float[Array, "n d"], coefficients: Coefficients, vector: Float[Array, " d"]
) -> Float[Array, " d"]:
    """``F^-1 v`` by two scans over the gradients. O(d n).

    Args:
        gradients: ``G``; (n, d).
        coefficients: the result of :func:`dynamic_coefficients`.
        vector: ``v``; (d,).

    Returns:
        ``F^-1 v``; (d,).
    """
    dtype = coefficients.lower.dtype
    gradients, vector = gradients.astype(dtype), vector.astype(dtype)
    dots = jnp.dot(gradients, vector, precision="highest")
    inside = jnp.dot(_inside(coefficients, dots), gradients, precision="highest")
    return vector / coefficients.damping - inside


def dynamic_direction(
    gradients: Float[Array, "n d"],
    dots: Float[Array, "n n"],
    coefficients: Coefficients,
    slot: Int[ArrayLike, ""],
) -> Float[Array, " d"]:
    """``F^-1 g`` for the newest gradient by one scan over the gradients. O(d n).

    Row ``slot`` of ``dots`` already holds the dot products of ``g`` with all gradients. ``g`` is
    itself a row of ``G``, so the direction is one combination of rows.

    Args:
        gradients: ``G``; (n, d).
        dots: ``g_i . g_j``; (n, n).
        coefficients: the result of :func:`dynamic_coefficients`.
        slot: the row of the newest gradient; scalar int.

    Returns:
        ``F^-1 g``; (d,).
    """
    dtype = coefficients.lower.dtype
    own = (jnp.arange(dots.shape[0]) == slot).astype(dtype) / coefficients.damping
    weights = own - _inside(coefficients, dots[slot].astype(dtype))
    return jnp.dot(weights, gradients.astype(dtype), precision="highest")


def _inside(coefficients: Coefficients, dots: Float[Array, " n"]) -> Float[Array, " n"]:
    """``c`` with ``G^T c = sum_j (h_j . v) / (n + g_j . h_j) h_j``, from ``G v``."""
    half = jnp.dot(coefficients.lower, dots, precision="highest") / coefficients.scales
    return jnp.dot(half, coefficients.lower, precision="highest")


def _wide(matrix: Array, damping: ArrayLike) -> tuple[Array, Float[Array, ""]]:
    _checks.positive_scalar(damping, "damping")
    matrix = matrix.astype(accumulation_dtype(matrix.dtype))
    return matrix, jnp.asarray(damping).astype(matrix.dtype)
