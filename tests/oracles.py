"""Float64 NumPy oracles, gradients of every awkward kind, and the one tolerance."""

from collections.abc import Callable

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# How far above the estimate eps x sqrt(length) x condition a correct result may lie.
SAFETY = 8.0


def tolerance(dtype: ArrayLike, length: int, condition: float = 1.0) -> float:
    """Relative error allowed to ``length`` rounded terms under a condition number."""
    eps = float(jax.numpy.finfo(dtype).eps)
    return SAFETY * eps * np.sqrt(max(length, 1)) * max(condition, 1.0)


def relative_error(got: ArrayLike, want: ArrayLike) -> float:
    """``|got - want| / |want|`` in the Euclidean norm; absolute where want is zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"expected shape {want.shape}, got {got.shape}"
    scale = np.max(np.abs(want), initial=0.0) or 1.0
    return float(np.linalg.norm((got - want) / scale) / (np.linalg.norm(want / scale) or 1.0))


def assert_close(
    got: ArrayLike,
    want: ArrayLike,
    *,
    length: int,
    condition: float = 1.0,
    dtype: ArrayLike = np.float32,
) -> None:
    """Fails where the relative error is above :func:`tolerance`."""
    error, allowed = relative_error(got, want), tolerance(dtype, length, condition)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"


def flat(tree: object) -> Vector:
    """The leaves of a tree as one float64 vector."""
    leaves = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


# The damped Fisher and its inverse. The singular value decomposition is accurate for
# rows of any scale, where a d x d solve is not; test_reference.py holds them together.


def fisher(gradients: ArrayLike, damping: float, denominator: float | None = None) -> Matrix:
    """``F = lambda I + G^T G / n``."""
    g = np.asarray(gradients, np.float64)
    return damping * np.eye(g.shape[1]) + g.T @ g / (denominator or len(g))


def inverse(gradients: ArrayLike, damping: float, denominator: float | None = None) -> Matrix:
    """``F^-1``, dense."""
    g = np.asarray(gradients, np.float64)
    _, s, vt = np.linalg.svd(g, full_matrices=True)
    spectrum = np.full(g.shape[1], damping)
    spectrum[: len(s)] += s**2 / (denominator or len(g))
    return (vt.T / spectrum) @ vt


def ihvp_combination(
    gradients: ArrayLike,
    coefficients: ArrayLike,
    damping: float,
    denominator: float | None = None,
) -> Vector:
    """``F^-1 G^T a``, without forming anything d x d."""
    g, a = np.asarray(gradients, np.float64), np.asarray(coefficients, np.float64)
    n = denominator or len(g)
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    return vt.T @ (n * s / (s**2 + n * damping) * (u.T @ a))


def recursion(gradients: ArrayLike, damping: float) -> Matrix:
    """``F^-1`` by the paper's Sherman-Morrison recursion, on the dense matrix."""
    g = np.asarray(gradients, np.float64)
    out = np.eye(g.shape[1]) / damping
    for row in g:
        h = out @ row
        out = out - np.outer(h, h) / (len(g) + row @ h)
    return out


def block_inverse(gradients: ArrayLike, damping: float, sizes: list[int]) -> Matrix:
    """The inverse of the block-diagonal part of ``F``."""
    g = np.asarray(gradients, np.float64)
    out, start = np.zeros((g.shape[1], g.shape[1])), 0
    for size in sizes:
        part = slice(start, start + size)
        out[part, part] = inverse(g[:, part], damping)
        start += size
    return out


def log_det(matrix: Matrix) -> float:
    """``log det`` of a positive definite matrix."""
    sign, value = np.linalg.slogdet(matrix)
    assert sign == 1
    return float(value)


def condition(gradients: ArrayLike, damping: float, denominator: float | None = None) -> float:
    """Condition number of ``A = n lambda I + G G^T`` scaled to a unit diagonal."""
    g = np.asarray(gradients, np.float64)
    a = g @ g.T + (denominator or len(g)) * damping * np.eye(len(g))
    size = np.sqrt(np.diag(a))
    return float(np.linalg.cond(a / size[:, None] / size[None, :]))


def cancellation(vector: ArrayLike, result: ArrayLike, damping: float) -> float:
    """How much larger ``v / lambda`` is than the ``F^-1 v`` that is left of it."""
    v, y = np.asarray(vector, np.float64), np.asarray(result, np.float64)
    return float(np.linalg.norm(v / damping) / np.linalg.norm(y))


# Gradients of every kind; float32 values, so that every oracle sees the same numbers.


def _correlated(rng: np.random.Generator, n: int, d: int) -> Matrix:
    return 0.9 * rng.normal(size=d) + np.sqrt(1 - 0.81) * rng.normal(size=(n, d))


def _duplicated(rng: np.random.Generator, n: int, d: int) -> Matrix:
    rows = _correlated(rng, n, d)
    rows[-1] = rows[n // 2] = rows[0]
    return rows


def _one_huge(rng: np.random.Generator, n: int, d: int) -> Matrix:
    rows = _correlated(rng, n, d)
    rows[n // 2] *= 1e6
    return rows


def _zero_rows(rng: np.random.Generator, n: int, d: int) -> Matrix:
    rows = _correlated(rng, n, d)
    rows[1::3] = 0
    return rows


def _ill_conditioned(rng: np.random.Generator, n: int, d: int) -> Matrix:
    u, _, vt = np.linalg.svd(rng.normal(size=(n, d)), full_matrices=False)
    return (u * np.geomspace(1, 1e-3, u.shape[1])) @ vt


KINDS: dict[str, Callable[[np.random.Generator, int, int], Matrix]] = {
    "independent": lambda rng, n, d: rng.normal(size=(n, d)),
    "correlated": _correlated,
    "ill-conditioned": _ill_conditioned,
    "duplicated": _duplicated,
    "one row 1e6": _one_huge,
    "all 1e-12": lambda rng, n, d: 1e-12 * _correlated(rng, n, d),
    "all 1e8": lambda rng, n, d: 1e8 * _correlated(rng, n, d),
    "zero rows": _zero_rows,
    "low rank": lambda rng, n, d: rng.normal(size=(n, 2)) @ rng.normal(size=(2, d)),
}


def gradients(kind: str, n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    """``n`` gradients of ``d`` entries of a kind of :data:`KINDS`."""
    return KINDS[kind](np.random.default_rng(seed), n, d).astype(np.float32)


def scale(rows: ArrayLike) -> float:
    """The mean squared entry of a typical row that is not zero."""
    squares = np.mean(np.asarray(rows, np.float64) ** 2, axis=1)
    return float(np.median(squares[squares > 0]))


def damping_for(rows: ArrayLike, relative: float) -> float:
    """A damping of ``relative`` times the scale of the rows, exact in float32."""
    return float(np.float32(relative * scale(rows)))
