"""The paper's recursions and the oracles hold one another up."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_jax import fisher_inverse, reference, rows

N, D = 6, 15
SHAPES = [(1, 4), (N, D), (17, 5)]


def problem(n=N, d=D, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=d), 0.3


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_oracles_agree(n, d):
    g, _, lam = problem(n, d)
    dense = np.linalg.inv(oracles.fisher(g, lam))
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(oracles.inverse(g, lam), dense, **close)
    np.testing.assert_allclose(oracles.recursion(g, lam), dense, **close)
    np.testing.assert_allclose(oracles.block_inverse(g, lam, [d]), dense, **close)
    a = np.arange(1.0, n + 1)
    np.testing.assert_allclose(oracles.ihvp_combination(g, a, lam), dense @ g.T @ a, **close)
    np.testing.assert_allclose(
        oracles.inverse(g, lam, denominator=3), np.linalg.inv(oracles.fisher(g, lam, 3)), **close
    )


def test_tolerance_helper_notices_an_error():
    with pytest.raises(AssertionError, match="relative error"):
        oracles.assert_close(np.ones(3) * 1.0001, np.ones(3), length=3)
    with pytest.raises(AssertionError, match="expected shape"):
        oracles.assert_close(np.ones(3), np.ones(4), length=3)


@pytest.mark.x64
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_static_recursion_in_float64(n, d):
    g, v, lam = problem(n, d)
    recursion = jax.jit(reference.static_recursion)(jnp.asarray(g), lam)
    dense = oracles.inverse(g, lam)
    np.testing.assert_allclose(reference.static_ihvp(recursion, jnp.asarray(v)), dense @ v, 1e-9)
    np.testing.assert_allclose(reference.static_diagonal(recursion), np.diag(dense), 1e-9)


@pytest.mark.x64
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_dynamic_recursion_in_float64(n, d):
    g, v, lam = problem(n, d)
    rows_, dots = jnp.asarray(g), jnp.asarray(g @ g.T)
    coefficients = jax.jit(reference.dynamic_coefficients)(dots, lam)
    dense = oracles.inverse(g, lam)
    got = reference.dynamic_ihvp(rows_, coefficients, jnp.asarray(v))
    np.testing.assert_allclose(got, dense @ v, 1e-9)
    for slot in {0, n // 2, n - 1}:
        got = jax.jit(reference.dynamic_direction)(rows_, dots, coefficients, slot)
        np.testing.assert_allclose(got, dense @ g[slot], 1e-9, 1e-12)


@pytest.mark.x64
def test_both_recursions_find_the_same_vectors():
    g, _, lam = problem()
    static = reference.static_recursion(jnp.asarray(g), lam)
    dynamic = reference.dynamic_coefficients(jnp.asarray(g @ g.T), lam)
    assert np.allclose(np.triu(dynamic.lower, 1), 0)
    np.testing.assert_allclose(np.asarray(dynamic.lower) @ g, static.vectors, 1e-9, 1e-12)
    np.testing.assert_allclose(dynamic.scales, static.scales, 1e-10)


@pytest.mark.x64
def test_whitened_rows_are_the_vectors_of_the_paper():
    g, _, lam = problem()
    static = reference.static_recursion(jnp.asarray(g), lam)
    whole = fisher_inverse(rows.as_rows(jnp.asarray(g)), lam).whiten()
    scaled = static.vectors / jnp.sqrt(static.scales)[:, None]
    whitened = whole.whitened.columns(0, g.shape[1])
    np.testing.assert_allclose(scaled, whitened / np.sqrt(lam), 1e-9, 1e-12)


def test_dense_fisher():
    g, _, lam = problem()
    got = reference.dense_fisher(jnp.asarray(g, jnp.float32), lam)
    oracles.assert_close(got, oracles.fisher(g, lam), length=N)


def test_low_precision_gradients_are_computed_in_float32():
    g, v, lam = problem()
    low = jnp.asarray(g, jnp.bfloat16)
    recursion = reference.static_recursion(low, lam)
    assert recursion.vectors.dtype == jnp.float32
    want = oracles.inverse(low, lam) @ v
    got = reference.static_ihvp(recursion, jnp.asarray(v, jnp.float32))
    oracles.assert_close(got, want, length=D, condition=oracles.cancellation(v, want, lam))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_impossible_damping_is_refused(damping):
    g = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="damping must be finite and greater than 0"):
        reference.static_recursion(g, damping)
    with pytest.raises(ValueError, match="damping must be finite and greater than 0"):
        reference.dynamic_coefficients(g @ g.T, damping)


@jax.jit
def static_ihvp(g, v, damping):
    return reference.static_ihvp(reference.static_recursion(g, damping), v)


@pytest.mark.x64
@given(seed=st.integers(0, 10_000), order=st.permutations(range(N)))
def test_the_order_of_gradients_does_not_matter(seed, order):
    g, v, lam = problem(seed=seed)
    got = static_ihvp(jnp.asarray(g[np.asarray(order)]), jnp.asarray(v), lam)
    np.testing.assert_allclose(got, oracles.inverse(g, lam) @ v, 1e-8, 1e-10)
