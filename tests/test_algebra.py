"""The n x n algebra on matrices from well-conditioned to singular."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import algebra

N = 8
SHIFT = jnp.float32(1e-3)


def gram(kind="independent", n=N, d=40, seed=0):
    g = oracles.gradients(kind, n, d, seed).astype(np.float64)
    return g @ g.T


def scaled_error(lower, matrix):
    """The backward error of a factor, every entry relative to its own scale."""
    lower = np.asarray(lower, np.float64)
    size = np.sqrt(np.diag(matrix))
    return np.max(np.abs(lower @ lower.T - matrix) / size[:, None] / size[None, :])


@pytest.mark.parametrize("kind", ["independent", "correlated", "ill-conditioned", "one row 1e6"])
def test_factor(kind):
    k = gram(kind)
    got = jax.jit(algebra.factor)(jnp.asarray(k, jnp.float32), SHIFT)
    assert got.floor == 0
    np.testing.assert_array_equal(got.lower, np.tril(got.lower))
    assert scaled_error(got.lower, k + float(SHIFT) * np.eye(N)) < oracles.tolerance(np.float32, N)


def test_rows_of_very_different_size():
    k = gram() * np.outer(np.geomspace(1e-9, 1e9, N), np.geomspace(1e-9, 1e9, N))
    got = algebra.factor(jnp.asarray(k, jnp.float32), jnp.float32(0))
    assert got.floor == 0
    assert scaled_error(got.lower, k) < oracles.tolerance(np.float32, N)


def test_only_a_singular_matrix_gets_a_floor():
    k = gram("duplicated")
    k /= k[0, 0]
    enough = algebra.factor(jnp.asarray(k, jnp.float32), jnp.float32(1e-3))
    assert enough.floor == 0
    singular = algebra.factor(jnp.asarray(k, jnp.float32), jnp.float32(0))
    assert 0 < singular.floor < 1e-4
    assert np.all(np.isfinite(singular.lower))
    assert np.all(np.diag(singular.lower) > 0)
    # The factor is that of the matrix plus the reported floor.
    floored = k + float(singular.floor) * np.diag(np.diag(k))
    assert scaled_error(singular.lower, floored) < oracles.tolerance(np.float32, N)


@pytest.mark.parametrize("n", [1, 16, 17, 31, 33, 100, 129, 512])
@pytest.mark.parametrize("kind", ["independent", "correlated", "one row 1e6", "low rank"])
def test_a_triangular_inverse_is_as_exact_as_a_solve(kind, n):
    k = jnp.asarray(gram(kind, n, 2 * n), jnp.float32)
    factor = algebra.factor(k, jnp.float32(0))  # floored where the rank is low
    inverse = algebra.inverse_lower(factor)
    np.testing.assert_array_equal(inverse, np.tril(inverse))
    exact = np.asarray(factor.lower, np.float64)
    want = np.linalg.inv(exact)
    solved = jax.scipy.linalg.solve_triangular(factor.lower, jnp.eye(n), lower=True)
    for residual in (
        lambda x: exact @ x - np.eye(n),
        lambda x: x @ exact - np.eye(n),
        lambda x: x - want,
    ):
        ours, theirs = (np.asarray(x, np.float64) for x in (inverse, solved))
        allowed = 4 * np.linalg.norm(residual(theirs)) + 1e-6 * np.linalg.norm(residual(0 * want))
        assert np.linalg.norm(residual(ours)) <= allowed


@pytest.mark.parametrize("n", [3, 17, 100])
def test_a_batch_of_inverse_roots_is_that_of_each_matrix(n):
    grams = jnp.stack(
        [jnp.asarray(gram("correlated", n, 2 * n, seed), jnp.float32) for seed in range(3)]
    )
    batch = algebra.inverse_root(grams, SHIFT)
    for k, root in zip(grams, batch, strict=True):
        alone = algebra.inverse_lower(algebra.factor(k, SHIFT))
        np.testing.assert_allclose(
            root, alone, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(alone)))
        )
    np.testing.assert_allclose(
        jax.vmap(algebra.inverse_root, (0, None))(grams, SHIFT),
        batch,
        rtol=1e-4,
        atol=1e-5 * float(jnp.max(jnp.abs(batch))),
    )


@pytest.mark.x64
def test_triangular_inverse_in_float64():
    lower = np.tril(np.random.default_rng(0).normal(size=(70, 70))) / 8 + 2 * np.eye(70)
    inverse = algebra.inverse_lower(algebra.Factor(jnp.asarray(lower), jnp.float64(0)))
    np.testing.assert_allclose(inverse @ lower, np.eye(70), atol=1e-13)


@pytest.mark.parametrize("kind", ["duplicated", "low rank"])
@pytest.mark.parametrize("shift", [0.0, 1e-12, 1e-6])
def test_singular_matrices_always_factor(kind, shift):
    got = algebra.factor(jnp.asarray(gram(kind), jnp.float32), jnp.float32(shift))
    assert np.all(np.isfinite(got.lower))
    assert np.all(np.isfinite(algebra.solve(got, jnp.ones(N))))


def test_zero_matrix():
    damped = algebra.factor(jnp.zeros((N, N)), jnp.float32(4))
    np.testing.assert_allclose(damped.lower, 2 * np.eye(N), 1e-6)
    absent = algebra.factor(jnp.zeros((N, N)), jnp.float32(0))
    np.testing.assert_allclose(absent.lower, np.eye(N))
    assert damped.floor == absent.floor == 0


def test_nan_ends_the_attempts_and_is_returned():
    got = jax.jit(algebra.factor)(jnp.full((3, 3), jnp.nan), SHIFT)
    assert np.any(np.isnan(got.lower))


def test_one_row():
    got = algebra.factor(jnp.array([[3.0]]), jnp.float32(1))
    assert got.lower.item() == 2
    np.testing.assert_allclose(algebra.solve(got, jnp.array([8.0])), [2.0])


def test_solves_and_determinant():
    k = gram()
    a = k + float(SHIFT) * np.eye(N)
    factor = algebra.factor(jnp.asarray(k, jnp.float32), SHIFT)
    condition = np.linalg.cond(a)
    for rhs in (np.arange(1.0, N + 1), np.arange(2.0 * N).reshape(N, 2)):
        got = algebra.solve(factor, jnp.asarray(rhs, jnp.float32))
        oracles.assert_close(got, np.linalg.solve(a, rhs), length=N, condition=condition)
        half = algebra.half_solve(factor, jnp.asarray(rhs, jnp.float32))
        want = np.linalg.solve(np.linalg.cholesky(a), rhs)
        oracles.assert_close(half, want, length=N, condition=condition)
    oracles.assert_close(
        algebra.inverse_lower(factor),
        np.linalg.inv(np.linalg.cholesky(a)),
        length=N,
        condition=condition,
    )
    oracles.assert_close(algebra.log_det(factor), oracles.log_det(a), length=N)


def test_a_refined_solve_is_as_exact_as_its_matrix():
    n = 64
    k = gram("correlated", n, 200).astype(np.float32)
    want = np.linalg.solve(k.astype(np.float64) + 0.5 * np.eye(n), np.eye(n)[3])
    factor = algebra.factor(jnp.asarray(k), jnp.float32(0.5))
    rhs = jnp.asarray(np.eye(n)[3], jnp.float32)
    plain = oracles.relative_error(algebra.solve(factor, rhs), want)
    refined = oracles.relative_error(
        jax.jit(algebra.refined_solve)(factor, jnp.asarray(k), jnp.float32(0.5), rhs), want
    )
    assert refined < 1e-7 < 4e-7 < plain


def test_a_floored_solve_is_not_refined():
    k = jnp.asarray(gram("duplicated"), jnp.float32)
    factor = algebra.factor(k, jnp.float32(0))
    assert factor.floor > 0
    rhs = jnp.arange(1.0, N + 1)
    refined = algebra.refined_solve(factor, k, jnp.float32(0), rhs)
    np.testing.assert_array_equal(refined, algebra.solve(factor, rhs))


@pytest.mark.x64
def test_float64():
    k = gram("correlated")
    factor = algebra.factor(jnp.asarray(k), jnp.float64(0.1))
    assert factor.lower.dtype == jnp.float64
    want = np.linalg.solve(k + 0.1 * np.eye(N), np.ones(N))
    np.testing.assert_allclose(algebra.solve(factor, jnp.ones(N)), want, 1e-11)
    got = algebra.refined_solve(factor, jnp.asarray(k), jnp.float64(0.1), jnp.ones(N))
    np.testing.assert_allclose(got, want, 1e-11)


def test_vmap_floors_each_matrix_on_its_own():
    ks = jnp.asarray(np.stack([gram(), gram("duplicated"), gram()]), jnp.float32)
    got = jax.jit(jax.vmap(algebra.factor, (0, None)))(ks, jnp.float32(0))
    assert got.floor[0] == got.floor[2] == 0
    assert got.floor[1] > 0
    for i in range(3):
        alone = algebra.factor(ks[i], jnp.float32(0))
        oracles.assert_close(got.lower[i], alone.lower, length=N, condition=1e3)
        oracles.assert_close(got.floor[i], alone.floor, length=1)


def test_equal_rows_share():
    g = oracles.gradients("independent", 5, 40).astype(np.float64)
    g[3] = g[1]
    k = jnp.asarray(g @ g.T, jnp.float32)
    a = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(algebra.share_between_equal_rows(k, a), [1, 3, 3, 3, 5], 1e-6)


def test_rows_that_are_only_parallel_or_of_equal_length_do_not_share():
    g = np.array([[1.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0]])
    a = jnp.array([1.0, 2.0, 3.0, 4.0])
    got = algebra.share_between_equal_rows(jnp.asarray(g @ g.T, jnp.float32), a)
    np.testing.assert_allclose(got, a)
