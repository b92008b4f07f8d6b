"""Inputs that once went wrong, or would in a less careful implementation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import fisher_inverse, mfac_precondition, rows, window
from mfac_jax.rows import Dense

N, D = 16, 40


def exact_newest(g, lam):
    g = np.asarray(g, np.float64)
    return np.linalg.solve(lam * np.eye(g.shape[1]) + g.T @ g / len(g), g[-1])


def unit(rng):
    g = rng.normal(size=D)
    return g / np.linalg.norm(g)


def rotated(rng):
    a, b = unit(rng), unit(rng)
    b = b - (a @ b) * a
    b /= np.linalg.norm(b)
    angles = 2e-4 * np.arange(N)
    return np.outer(np.cos(angles), a) + np.outer(np.sin(angles), b)


def drifting(rng):
    return np.outer(1 + 1e-7 * np.arange(N), unit(rng))


def noisy(rng):
    return unit(rng)[None] + 1e-5 * rng.normal(size=(N, D)) / np.sqrt(D)


@pytest.mark.parametrize("make", [rotated, drifting, noisy])
@pytest.mark.parametrize("packing", ["flat", "leaf"])
def test_nearly_equal_gradients_are_not_taken_for_equal(make, packing):
    g = jnp.asarray(make(np.random.default_rng(0)), jnp.float32)
    held = window.init(g[0], N, storage=Dense(packing=packing))
    held, _ = jax.lax.scan(window.push, held, g)
    got, want = window.ihvp_newest(held, 1e-2), exact_newest(g, 1e-2)
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("damping", [{}, {"damping": 1e-3}])
def test_gradients_whose_sums_overflow_are_rejected(damping):
    tx = mfac_precondition(N, **damping)
    update = jax.jit(tx.update)
    rng = np.random.default_rng(0)
    state = tx.init(jnp.zeros(D))
    for step in range(2 * N):
        scale = 1.5e19 if step in (5, 9) else 1.0
        direction, state = update(jnp.asarray(scale * unit(rng), jnp.float32), state)
        assert jnp.all(jnp.isfinite(direction))
    assert int(state.window.rejected) == 2


@pytest.mark.parametrize("packing", ["flat", "leaf"])
@pytest.mark.parametrize("slot", [3, 5, -1, -7])
def test_a_traced_slot_out_of_range_changes_nothing(slot, packing):
    g = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    held = window.init(jnp.zeros(5), 3, storage=Dense(packing=packing))
    held, _ = jax.lax.scan(window.push, held, jnp.asarray(g[:3]))
    replaced, info = jax.jit(window.replace)(held, jnp.asarray(slot), jnp.asarray(g[3]))
    assert not info.accepted
    removed = jax.jit(window.remove)(held, jnp.asarray(slot))
    for changed in (replaced._replace(rejected=held.rejected), removed):
        chex.assert_trees_all_equal(changed, held)


def test_a_slot_is_one_slot():
    held = window.init(jnp.zeros(5), 3)
    with pytest.raises(ValueError, match=r"slot must be one slot, got .* \(2,\)"):
        window.remove(held, np.array([1, 2]))


@pytest.mark.parametrize("value", [jnp.float32(-1.0), np.float32(0.0), jnp.float32(jnp.nan), -1])
def test_known_arrays_are_looked_at_like_numbers(value):
    g = rows.as_rows(jnp.eye(3))
    held = window.from_rows(g)
    calls = [
        lambda: mfac_precondition(3, value),
        lambda: window.ihvp(held, jnp.ones(3), value),
        lambda: fisher_inverse(g, value),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="damping must be finite and greater than 0"):
            call()


@pytest.mark.parametrize("damping", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("blocks", [None, 8, 20])
def test_quadratic_form_inside_the_span(damping, blocks):
    rng = np.random.default_rng(0)
    g = (rng.normal(size=D) + 0.5 * rng.normal(size=(10, D))).astype("float32")
    v = g.mean(0)
    want, size = 0.0, blocks or D
    for start in range(0, D, size):
        part = g[:, start : start + size].astype("float64")
        own = part.shape[1]
        fisher = damping * np.eye(own) + part.T @ part / len(part)
        here = v[start : start + size].astype("float64")
        want += here @ np.linalg.solve(fisher, here)
    got = fisher_inverse(rows.as_rows(jnp.asarray(g)), damping, blocks=blocks)
    np.testing.assert_allclose(got.quadratic_form(jnp.asarray(v)), want, rtol=1e-3)


@pytest.mark.parametrize("blocks", [None, 3])
def test_traced_entries_out_of_range_are_nan(blocks):
    inverse = fisher_inverse(rows.as_rows(jnp.ones((2, 5))), 0.1, blocks=blocks)
    got = jax.jit(inverse.entries)(jnp.array([0, 5, -1, 2]), jnp.array([0, 0, 2, 7]))
    np.testing.assert_array_equal(np.isnan(got), [False, True, True, True])


@pytest.mark.parametrize("blocks", [None, 32, 64, 128, 1024])
def test_a_diagonal_takes_a_fraction_of_the_memory_of_its_gradients(blocks):
    n, d = 64, 2**20
    template = jax.eval_shape(lambda: Dense().empty(jnp.zeros(d), n))

    def diagonal(g):
        return fisher_inverse(g, 0.1, blocks=blocks).diagonal()

    compiled = jax.jit(diagonal).lower(template).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * n * d


@pytest.mark.wrong_types
def test_arrays_in_place_of_rows():
    for call in (lambda g: fisher_inverse(g, 1.0), window.from_rows):
        with pytest.raises(TypeError, match=r"rows must be gradient rows .* got ArrayImpl"):
            call(jnp.ones((2, 3)))


@pytest.mark.wrong_types
def test_the_factory_looks_at_its_options():
    with pytest.raises(TypeError, match="storage must be a storage"):
        mfac_precondition(3, storage="disk")
    with pytest.raises(TypeError, match=r"dtype must be one of .* got 'garbage'"):
        Dense("garbage")
    with pytest.raises(ValueError, match="alive does not have the structure"):
        mfac_precondition(3, alive={"a": True}).init(jnp.zeros(3))


@pytest.mark.wrong_types
def test_coordinates_and_blocks_of_another_kind():
    inverse = fisher_inverse(rows.as_rows(jnp.ones((2, 5))), 0.1)
    with pytest.raises(ValueError, match="coordinates must be a list"):
        inverse.submatrix(3)
    with pytest.raises(ValueError, match=r"coordinates must lie in 0..4, got 9"):
        inverse.submatrix([9])
    with pytest.raises(TypeError, match="blocks must be None, an int, 'leaf' or a sequence"):
        fisher_inverse(rows.as_rows(jnp.ones((2, 5))), 0.1, blocks=np.array([2, 3]))
