"""Natural gradients in row space against dense float64 solves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import outside
import pytest
from oracles import assert_close, flat

from mfac_jax import natural_gradient
from mfac_jax.rows import Dense, as_rows

N, D = 5, 11
PARAMS = {"b": jnp.zeros(3), "w": jnp.zeros((2, 4))}


def rows_of(matrix):
    """A matrix (n, d) as a stacked tree."""
    return {"b": jnp.asarray(matrix[:, :3]), "w": jnp.asarray(matrix[:, 3:]).reshape(-1, 2, 4)}


def stream(kind, steps=4, n=N):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        g, r = rng.normal(size=(n, D)), rng.normal(size=n)
        if kind == "repeated":
            g[1] = g[0]
        if kind == "correlated":
            g += 3 * rng.normal(size=D)
        if kind == "tiny":
            g *= 1e-12
        yield g.astype(np.float32), r.astype(np.float32)


def dense(g, r, lam, previous, momentum, center):
    """SPRING with the d x d matrix."""
    g, r = np.asarray(g, np.float64), np.asarray(r, np.float64)
    if center:
        g, r = g - g.mean(0), r - r.mean()
    pull = momentum * previous
    fisher = g.T @ g / len(g) + lam * np.eye(D)
    return np.linalg.solve(fisher, g.T @ r / len(g) + lam * pull)


def trace(g, center):
    g = np.asarray(g, np.float64)
    return np.sum((g - g.mean(0)) ** 2 if center else g**2) / len(g)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_are_centered_before_they_are_multiplied(momentum):
    """A mean of 1,000 times the spread; a Gram matrix would lose half of the direction."""
    tx = natural_gradient(relative_damping=0.01, momentum=momentum, center=True)
    rng = np.random.default_rng(0)
    shift = rng.integers(-4, 5, D) * 2.0**10
    state, previous = tx.init(PARAMS), np.zeros(D)
    for g, r in stream("independent"):
        shifted = (g.round(3) + shift).astype(np.float32)
        found, state = tx.update(rows_of(shifted), state, PARAMS, residuals=r)
        lam = 0.01 * trace(shifted, True)
        previous = dense(shifted, r, lam, previous, momentum, True)
        np.testing.assert_allclose(flat(found), previous, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["independent", "repeated", "correlated", "tiny"])
def test_directions_are_those_of_the_dense_matrix(kind, momentum, center):
    tx = natural_gradient(relative_damping=0.01, momentum=momentum, center=center)
    update = jax.jit(tx.update)
    state, previous = tx.init(PARAMS), np.zeros(D)
    for g, r in stream(kind):
        found, state = update(rows_of(g), state, PARAMS, residuals=r)
        lam = 0.01 * trace(g, center)
        previous = dense(g, r, lam, previous, momentum, center)
        assert_close(flat(found), previous, length=D * N, condition=1e2)
    assert int(state.count) == 4
    assert (state.previous is None) == (momentum == 0)


@pytest.mark.parametrize("storage", [Dense(), Dense(jnp.bfloat16, packing="leaf"), outside.Half()])
def test_any_rows_are_accepted(storage):
    g, r = next(stream("independent"))
    rows = as_rows(rows_of(g), PARAMS, storage=storage)
    tx = natural_gradient(0.1, momentum=0.5)
    found, _ = tx.update(rows, tx.init(PARAMS), PARAMS, residuals=r)
    want, _ = tx.update(rows_of(g), tx.init(PARAMS), PARAMS, residuals=r)
    np.testing.assert_allclose(flat(found), flat(want), rtol=0.05, atol=0.02)


def test_the_number_of_rows_may_change():
    tx = natural_gradient(0.1, momentum=0.5)
    state = tx.init(PARAMS)
    for n in (5, 3, 5):
        g, r = next(stream("independent", n=n))
        updates, state = jax.jit(tx.update)(rows_of(g), state, PARAMS, residuals=r)
        assert np.isfinite(flat(updates)).all()


@pytest.mark.parametrize("place", ["rows", "residuals"])
def test_a_bad_step_is_rejected(place):
    tx = natural_gradient(0.1, momentum=0.5)
    g, r = next(stream("independent"))
    _, state = tx.update(rows_of(g), tx.init(PARAMS), PARAMS, residuals=r)
    (g if place == "rows" else r)[1] = np.nan
    updates, after = jax.jit(tx.update)(rows_of(g), state, PARAMS, residuals=r)
    assert not flat(updates).any()
    assert (int(after.rejected), int(after.count)) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, after.previous, state.previous)


def test_least_squares_is_solved_in_one_step():
    x = jax.random.normal(jax.random.key(0), (20, 2, 4))
    truth = jnp.arange(8.0).reshape(2, 4)
    tx = optax.chain(natural_gradient(1e-6), optax.scale_by_learning_rate(1.0))
    w = jnp.zeros((2, 4))
    residuals = jnp.tensordot(x, w - truth, 2)
    updates, _ = tx.update(x, tx.init(w), w, residuals=residuals)
    np.testing.assert_allclose(optax.apply_updates(w, updates), truth, atol=1e-3)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping must be finite and greater than 0"),
        ({"relative_damping": "0.1"}, TypeError, "relative_damping must be a number"),
        ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\)"),
    ],
)
def test_errors_of_arguments(options, error, message):
    with pytest.raises(error, match=message):
        natural_gradient(**options)


@pytest.mark.wrong_types
def test_errors_of_updates():
    tx = natural_gradient()
    g, r = next(stream("independent"))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs the residuals of the step.*residuals=None"):
        tx.update(rows_of(g), state, PARAMS)
    with pytest.raises(ValueError, match=r"residuals must have shape \(5,\).*got \(4,\)"):
        tx.update(rows_of(g), state, PARAMS, residuals=r[:4])
    with pytest.raises(ValueError, match="gradients do not fit params"):
        tx.update({"b": jnp.ones((5, 3))}, state, PARAMS, residuals=r)
