"""The inverse that the optimizer carries from step to step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from mfac_jax import carried, mfac_precondition, optimizer, window

M, D = 24, 150


def gram_of(gradients):
    wide = np.asarray(gradients, np.float64)
    return jnp.asarray((wide @ wide.T).astype(np.float32))


def exact(gram, shift):
    return np.linalg.inv(np.asarray(gram, np.float64) + float(shift) * np.eye(len(gram)))


def made(gram, shift):
    """An inverse made anew, as the first call does."""
    start = carried.empty(len(gram), gram.dtype)
    return carried.solve(start, gram, jnp.float32(shift), jnp.ones(len(gram)))[1]


@pytest.mark.parametrize("kind", ["independent", "correlated"])
@pytest.mark.parametrize("slot", [0, 7, M - 1])
def test_replace_gives_the_inverse_of_the_new_matrix(kind, slot):
    g = oracles.gradients(kind, M + 1, D)
    new = g[:M].copy()
    new[slot] = g[M]
    inverse = carried.replace(made(gram_of(g[:M]), 1.0), gram_of(new), jnp.int32(slot))
    condition = np.linalg.cond(exact(gram_of(new), 1.0))
    oracles.assert_close(inverse.matrix, exact(gram_of(new), 1.0), length=M, condition=condition)
    # Every entry and its mirror image take the same few operations, fused or not as the compiler
    # likes: they differ by roundings of the terms that they are made of.
    size = np.sqrt(np.diag(exact(gram_of(g[:M]), 1.0)) + np.diag(inverse.matrix))
    asymmetry = np.abs(inverse.matrix - inverse.matrix.T) / size[:, None] / size[None, :]
    assert np.max(asymmetry) <= oracles.tolerance(np.float32, 1)


def test_replace_fills_an_empty_slot():
    g = oracles.gradients("independent", M, D)
    g[5:] = 0
    before = made(gram_of(g), 1.0)
    g[5] = g[4][::-1]
    inverse = carried.replace(before, gram_of(g), jnp.int32(5))
    oracles.assert_close(inverse.matrix, exact(gram_of(g), 1.0), length=M, condition=100)


@pytest.mark.parametrize(
    ("factor", "is_kept"), [(1.0, True), (0.85, True), (1.15, True), (3.0, False)]
)
def test_a_shift_that_moved_is_solved_for_exactly(factor, is_kept):
    gram = gram_of(oracles.gradients("correlated", M, D))
    before, shift, rhs = made(gram, 1.0), jnp.float32(factor), jnp.arange(1.0, M + 1)
    solution, after = jax.jit(carried.solve)(before, gram, shift, rhs)
    condition = np.linalg.cond(exact(gram, shift))
    oracles.assert_close(
        solution, exact(gram, shift) @ np.asarray(rhs), length=1, condition=condition
    )
    assert bool(jnp.all(after.matrix == before.matrix)) == is_kept


@pytest.mark.parametrize("what", ["empty", "NaN", "of another window"])
def test_whatever_is_carried_the_solution_is_one(what):
    gram = gram_of(oracles.gradients("independent", M, D))
    wrong = {
        "empty": carried.empty(M, jnp.float32),
        "NaN": carried.CarriedInverse(jnp.full((M, M), jnp.nan), jnp.float32(1)),
        "of another window": made(gram_of(oracles.gradients("correlated", M, D)), 1.0),
    }[what]
    rhs = jnp.ones(M)
    solution, after = carried.solve(wrong, gram, jnp.float32(1), rhs)
    oracles.assert_close(solution, exact(gram, 1.0).sum(1), length=M, condition=100)
    oracles.assert_close(after.matrix, exact(gram, 1.0), length=M, condition=100)


def test_a_solution_is_checked_where_the_inverse_does_not_reach():
    """A slot whose gradient shrank out of turn: ``P`` knows next to nothing of it."""
    before = jnp.diag(jnp.array([1.0, 1e8], jnp.float32))
    after = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    inverse = carried.replace(made(before, 1.0), after, jnp.int32(0))
    rhs = jnp.array([1.0, 0.0])
    solution, _ = carried.solve(inverse, after, jnp.float32(1), rhs)
    oracles.assert_close(solution, exact(after, 1.0)[0], length=2, condition=3)


def test_no_nan_is_made_on_the_way():
    with jax.debug_nans(True):
        assert not carried.replace(carried.empty(2), jnp.ones((2, 2)), jnp.int32(0)).matrix.any()
        tx = mfac_precondition(optimizer.CARRY_FROM)
        state = tx.init(jnp.zeros(200))
        for i in range(3):
            _, state = tx.update(jnp.arange(200.0) + i, state)
    assert state.inverse.matrix.any()


@pytest.mark.jax_defaults
def test_the_contract_holds_where_the_inverse_is_carried(monkeypatch):
    """Rejected gradients, vmap, an average over the window's size, and mapped parameters."""
    monkeypatch.setattr(optimizer, "CARRY_FROM", 1)
    g = oracles.gradients("correlated", 12, D)
    g[5, 3] = np.nan
    for m in (1, 4):
        tx = mfac_precondition(m, damping=0.1, normalize_by="window_size")

        def run(scale, tx=tx, m=m):
            def step(state, row):
                direction, state = tx.update(scale * row, state)
                return state, (direction, window.ihvp_newest(state.window, 0.1, denominator=m))

            return jax.lax.scan(step, tx.init(jnp.zeros(D)), jnp.asarray(g))[1]

        got, want = jax.vmap(run)(jnp.array([1.0, 10.0]))
        want = want.at[:, 5].set(0)  # rejected
        oracles.assert_close(got, want, length=D, condition=100)
        state = tx.init(jnp.zeros(D))
        mapped = optax.tree.map_params(tx, lambda x: x, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_a_window_too_singular_carries_nothing_and_is_still_solved():
    g = oracles.gradients("correlated", M, D)
    g[3] = g[9]
    inverse = carried.empty(M, jnp.float32)
    w = window.init(jnp.zeros(D), M)
    for row in g:
        w, _ = window.push(w, jnp.asarray(row))
        got, inverse = window.ihvp_newest_carried(w, 1e-7, inverse)
    np.testing.assert_array_equal(inverse.matrix, jnp.zeros((M, M)))
    want = window.ihvp_newest(w, 1e-7)
    oracles.assert_close(got, want, length=D, condition=1)


@pytest.mark.jax_defaults
@pytest.mark.parametrize(
    "damping", [{}, {"damping": 0.1}, {"damping": lambda count: 0.9999**count}]
)
@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_ten_thousand_steps_leave_no_drift(monkeypatch, kind, damping):
    """The direction is that of a window factored anew, and it is rarely factored."""
    monkeypatch.setattr(optimizer, "CARRY_FROM", 1)
    steps, g = 10_000, oracles.gradients(kind, 64, D)
    tx = mfac_precondition(M, **damping)

    def step(i, carry):
        before, anew = carry
        size = jnp.exp(jnp.sin(i / 500))
        _, state = tx.update(size * jnp.asarray(g)[i * 37 % 64], before)
        slot = window.newest_slot(state.window)
        kept = carried.replace(before.inverse, state.window.gram, slot)
        return state, anew + jnp.any(kept.matrix != state.inverse.matrix)

    start = tx.init(jnp.zeros(D))
    state, anew = jax.jit(lambda s: jax.lax.fori_loop(0, steps, step, (s, 0)))(start)
    assert int(anew) < steps / 20
    newest = jnp.asarray(g)[17]
    got, after = tx.update(newest, state)
    lam = (
        damping["damping"](steps) if callable(damping.get("damping")) else damping.get("damping")
    ) or 0.01 * window.fisher_trace(after.window)
    held = np.asarray(after.window.rows.columns(0, D), np.float64)
    want = oracles.inverse(held, float(lam)) @ np.asarray(newest, np.float64)
    oracles.assert_close(got, want, length=D, condition=oracles.condition(held, float(lam)) ** 0.5)


@pytest.mark.jax_defaults
def test_the_optimizer_carries_from_a_size_on(monkeypatch):
    params = jnp.zeros(D)
    m = optimizer.CARRY_FROM
    assert mfac_precondition(m - 1).init(jnp.zeros(1000)).inverse is None
    for d, size in [(1000, m), (m, 1), (0, 1)]:
        state = mfac_precondition(m).init(jnp.zeros(d))
        assert state.inverse.matrix.shape == (size, size)
    _, state = mfac_precondition(m).update(jnp.ones(m), mfac_precondition(m).init(jnp.zeros(m)))
    assert not state.inverse.matrix.any()
    monkeypatch.setattr(optimizer, "CARRY_FROM", 1)
    carries, plain = mfac_precondition(8), mfac_precondition(8)
    state = carries.init(params)
    monkeypatch.setattr(optimizer, "CARRY_FROM", 100)
    other = plain.init(params)
    for row in oracles.gradients("correlated", 20, D):
        got, state = carries.update(jnp.asarray(row), state)
        want, other = plain.update(jnp.asarray(row), other)
        oracles.assert_close(got, want, length=D, condition=10)
    # What is done to the window by other means is noticed.
    mask = jnp.arange(D) % 2 == 0
    state = state._replace(window=window.restrict(state.window, mask))
    other = other._replace(window=window.restrict(other.window, mask))
    got, state = carries.update(mask / jnp.arange(1.0, D + 1), state)
    want, _ = plain.update(mask / jnp.arange(1.0, D + 1), other)
    oracles.assert_close(got, want, length=D, condition=10)


def test_an_inverse_of_another_size_is_refused():
    w = window.init(jnp.zeros(5), 3)
    with pytest.raises(ValueError, match=r"window of 3 gradients, float32 .*\(3, 3\).*\(4, 4\)"):
        window.ihvp_newest_carried(w, 1.0, carried.empty(4, jnp.float32))
