"""The inverse that the optimizer carries from step to step."""

import functools

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


# One program for all tests: what is not jitted is compiled operation by operation.
solve = jax.jit(carried.solve)
replace = jax.jit(carried.replace)


def made(gram, shift):
    """An inverse made anew, as the first call does."""
    start = carried.empty(len(gram), gram.dtype)
    return solve(start, gram, jnp.float32(shift), jnp.ones(len(gram)))[1]


@pytest.fixture
def carry_from_one(monkeypatch):
    monkeypatch.setattr(optimizer, "CARRY_FROM", 1)
    monkeypatch.setattr(carried, "CARRY_ON_CPU_FROM", 1)


@pytest.mark.parametrize("kind", ["independent", "correlated"])
@pytest.mark.parametrize("slot", [0, 7, M - 1])
def test_replace_gives_the_inverse_of_the_new_matrix(kind, slot):
    g = oracles.gradients(kind, M + 1, D)
    new = g[:M].copy()
    new[slot] = g[M]
    inverse = replace(made(gram_of(g[:M]), 1.0), gram_of(new), jnp.int32(slot))
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
    inverse = replace(before, gram_of(g), jnp.int32(5))
    oracles.assert_close(inverse.matrix, exact(gram_of(g), 1.0), length=M, condition=100)


@pytest.mark.parametrize(
    ("factor", "is_kept"), [(1.0, True), (0.85, True), (1.15, True), (3.0, False)]
)
def test_a_shift_that_moved_is_solved_for_exactly(factor, is_kept):
    gram = gram_of(oracles.gradients("correlated", M, D))
    before, shift, rhs = made(gram, 1.0), jnp.float32(factor), jnp.arange(1.0, M + 1)
    solution, after = solve(before, gram, shift, rhs)
    condition = np.linalg.cond(exact(gram, shift))
    oracles.assert_close(
        solution, exact(gram, shift) @ np.asarray(rhs), length=1, condition=condition
    )
    assert bool(jnp.all(after.matrix == before.matrix)) == is_kept


@pytest.mark.parametrize("m", [64, 512])
@pytest.mark.parametrize("relative", [1e-2, 1e-4])
def test_a_moved_shift_does_not_cost_accuracy(m, relative):
    """After many rows have been replaced, so that rounding errors have gathered in ``P``."""
    g = oracles.gradients("correlated", 2 * m, 4 * m).astype(np.float64)
    held = g[:m].copy()
    gram = held @ held.T
    shift = np.float32(relative * np.trace(gram))
    inverse = made(jnp.asarray(gram, jnp.float32), shift)
    for slot in range(min(m, 100)):
        held[slot] = g[m + slot]
        gram[slot] = gram[:, slot] = held @ held[slot]
        inverse = replace(inverse, jnp.asarray(gram, jnp.float32), jnp.int32(slot))
    rhs = jnp.arange(m) == m - 1
    single = jnp.asarray(gram, jnp.float32)
    for factor in (0.87, 0.95, 0.99, 1.01, 1.05, 1.15):
        moved = jnp.float32(factor * shift)
        solution, after = solve(inverse, single, moved, rhs.astype(jnp.float32))
        assert bool(jnp.all(after.matrix == inverse.matrix))  # P was not made anew
        oracles.assert_close(solution, exact(single, moved)[-1], length=m)


@pytest.mark.parametrize("what", ["empty", "NaN", "of another window"])
def test_whatever_is_carried_the_solution_is_one(what):
    gram = gram_of(oracles.gradients("independent", M, D))
    wrong = {
        "empty": carried.empty(M, jnp.float32),
        "NaN": carried.CarriedInverse(jnp.full((M, M), jnp.nan), jnp.float32(1)),
        "of another window": made(gram_of(oracles.gradients("correlated", M, D)), 1.0),
    }[what]
    rhs = jnp.ones(M)
    solution, after = solve(wrong, gram, jnp.float32(1), rhs)
    oracles.assert_close(solution, exact(gram, 1.0).sum(1), length=M, condition=100)
    oracles.assert_close(after.matrix, exact(gram, 1.0), length=M, condition=100)


def test_a_solution_is_checked_where_the_inverse_does_not_reach():
    """A slot whose gradient shrank out of turn: ``P`` knows next to nothing of it."""
    before = jnp.diag(jnp.array([1.0, 1e8], jnp.float32))
    after = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    inverse = replace(made(before, 1.0), after, jnp.int32(0))
    rhs = jnp.array([1.0, 0.0])
    solution, _ = solve(inverse, after, jnp.float32(1), rhs)
    oracles.assert_close(solution, exact(after, 1.0)[0], length=2, condition=3)


def test_no_nan_is_made_on_the_way(carry_from_one):
    with jax.debug_nans(True):
        assert not replace(carried.empty(2), jnp.ones((2, 2)), jnp.int32(0)).matrix.any()
        tx = mfac_precondition(8)
        state, update = tx.init(jnp.zeros(20)), jax.jit(tx.update)
        for i in range(3):
            _, state = update(jnp.arange(20.0) + i, state)
    assert state.inverse.matrix.any()


@pytest.mark.jax_defaults
def test_the_contract_holds_where_the_inverse_is_carried(carry_from_one):
    """Rejected gradients, vmap, an average over the window's size, and mapped parameters."""
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


def test_a_window_too_singular_carries_nothing_and_is_still_solved(carry_from_one):
    g = oracles.gradients("correlated", M, D)
    g[3] = g[9]
    inverse = carried.empty(M, jnp.float32)

    @jax.jit
    def step(w, inverse, row):
        w, _ = window.push(w, row)
        return w, *window.ihvp_newest_carried(w, 1e-7, inverse)

    w = window.init(jnp.zeros(D), M)
    for row in g:
        w, got, inverse = step(w, inverse, row)
    np.testing.assert_array_equal(inverse.matrix, jnp.zeros((M, M)))
    want = jax.jit(window.ihvp_newest)(w, 1e-7)
    oracles.assert_close(got, want, length=D, condition=1)


def test_a_cpu_factors_small_matrices_and_a_gpu_does_not():
    gram = gram_of(oracles.gradients("correlated", M, D))
    empty, arguments = carried.empty(M), (gram, jnp.int32(3), jnp.float32(1))
    coefficients, after = jax.jit(carried.newest)(empty, *arguments)
    oracles.assert_close(coefficients, exact(gram, 1.0)[3], length=M, condition=100)
    assert not after.matrix.any()
    # Whether to factor is decided in the step on a GPU, and not at all on a CPU.
    newest = jax.jit(carried.newest)
    assert "conditional(" not in newest.lower(empty, *arguments).compile().as_text()
    allowed = [jax.export.DisabledSafetyCheck.custom_call("cusolver_potrf_ffi")]
    text = {
        platform: jax.export.export(newest, platforms=[platform], disabled_checks=allowed)(
            empty, *arguments
        ).mlir_module()
        for platform in ("cpu", "cuda")
    }
    assert text["cuda"].count("stablehlo.case") > text["cpu"].count("stablehlo.case")


DAMPINGS = {
    "relative": {},
    "fixed": {"damping": 0.1},
    "scheduled": {"damping": lambda count: 0.9999**count},
}


@functools.cache
def ten_thousand_steps(damping):
    """How often the inverse is made anew, and one more update; one program for all kinds."""
    tx = mfac_precondition(M, **DAMPINGS[damping])

    def step(i, carry, g):
        before, anew = carry
        size = jnp.exp(jnp.sin(i / 500))
        _, state = tx.update(size * g[i * 37 % len(g)], before)
        slot = window.newest_slot(state.window)
        kept = carried.replace(before.inverse, state.window.gram, slot)
        anew += jnp.any(kept.matrix != state.inverse.matrix)
        return state, anew

    @jax.jit
    def run(g):
        start = tx.init(jnp.zeros(D)), 0
        state, anew = jax.lax.fori_loop(0, 10_000, lambda i, carry: step(i, carry, g), start)
        return anew, tx.update(g[17], state)

    return run


@pytest.mark.jax_defaults
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_ten_thousand_steps_leave_no_drift(carry_from_one, kind, damping):
    """The direction is that of a window factored anew, and it is rarely factored."""
    g = oracles.gradients(kind, 64, D)
    anew, (got, after) = ten_thousand_steps(damping)(jnp.asarray(g))
    assert int(anew) < 10_000 / 20
    lam = {"fixed": 0.1, "scheduled": 0.9999**10_000}.get(damping)
    lam = float(0.01 * window.fisher_trace(after.window) if lam is None else lam)
    held = np.asarray(after.window.rows.columns(0, D), np.float64)
    want = oracles.inverse(held, lam) @ np.asarray(g[17], np.float64)
    oracles.assert_close(got, want, length=D, condition=oracles.condition(held, lam) ** 0.5)


@pytest.mark.jax_defaults
def test_the_optimizer_carries_from_a_size_on(monkeypatch):
    m = optimizer.CARRY_FROM
    assert mfac_precondition(m - 1).init(jnp.zeros(1000)).inverse is None
    for d, size in [(1000, m), (0, 1), (m, 1)]:
        state = mfac_precondition(m).init(jnp.zeros(d))
        assert state.inverse.matrix.shape == (size, size)
    _, state = jax.jit(mfac_precondition(m).update)(jnp.ones(m), state)
    assert not state.inverse.matrix.any()

    monkeypatch.setattr(carried, "CARRY_ON_CPU_FROM", 1)

    def start(carry_from):
        monkeypatch.setattr(optimizer, "CARRY_FROM", carry_from)
        tx = mfac_precondition(8)
        return jax.jit(tx.update), tx.init(jnp.zeros(D))

    (carries, state), (plain, other) = start(8), start(9)
    assert other.inverse is None
    for row in oracles.gradients("correlated", 20, D):
        got, state = carries(jnp.asarray(row), state)
        want, other = plain(jnp.asarray(row), other)
        oracles.assert_close(got, want, length=D, condition=10)
    # What is done to the window by other means is noticed.
    mask = jnp.arange(D) % 2 == 0
    state = state._replace(window=window.restrict(state.window, mask))
    other = other._replace(window=window.restrict(other.window, mask))
    got, state = carries(mask / jnp.arange(1.0, D + 1), state)
    want, _ = plain(mask / jnp.arange(1.0, D + 1), other)
    oracles.assert_close(got, want, length=D, condition=10)


def test_an_inverse_of_another_size_is_refused():
    w = window.init(jnp.zeros(5), 3)
    with pytest.raises(ValueError, match=r"window of 3 gradients, float32 .*\(3, 3\).*\(4, 4\)"):
        window.ihvp_newest_carried(w, 1.0, carried.empty(4, jnp.float32))
