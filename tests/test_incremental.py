"""The inverse that the optimizer updates from step to step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from mfac_jax import incremental, mfac_precondition, window
from mfac_jax.optimizer import _precondition as optimizer

M, D = 24, 150


def gram_of(gradients):
    wide = np.asarray(gradients, np.float64)
    return jnp.asarray((wide @ wide.T).astype(np.float32))


def exact(gram, shift):
    return np.linalg.inv(np.asarray(gram, np.float64) + float(shift) * np.eye(len(gram)))


# Jitted once for all tests: eager calls compile operation by operation.
solve = jax.jit(incremental.solve)
replace = jax.jit(incremental.replace)


def built(gram, shift):
    """An inverse built by a factorization, as in the first call."""
    start = incremental.empty(len(gram), gram.dtype)
    return solve(start, gram, jnp.float32(shift), jnp.ones(len(gram)))[1]


@pytest.fixture
def incremental_from_one(monkeypatch):
    monkeypatch.setattr(optimizer, "INCREMENTAL_FROM", 1)
    monkeypatch.setattr(incremental, "ON_CPU_FROM", 1)


@pytest.mark.parametrize("kind", ["independent", "correlated"])
@pytest.mark.parametrize("slot", [0, 7, M - 1])
def test_replace_gives_the_inverse_of_the_new_matrix(kind, slot):
    g = oracles.gradients(kind, M + 1, D)
    new = g[:M].copy()
    new[slot] = g[M]
    inverse = replace(built(gram_of(g[:M]), 1.0), gram_of(new), jnp.int32(slot))
    condition = np.linalg.cond(exact(gram_of(new), 1.0))
    oracles.assert_close(inverse.matrix, exact(gram_of(new), 1.0), length=M, condition=condition)
    # An entry and its mirror image take the same few operations, but the compiler may fuse them
    # differently. They differ by rounding errors of their terms.
    size = np.sqrt(np.diag(exact(gram_of(g[:M]), 1.0)) + np.diag(inverse.matrix))
    asymmetry = np.abs(inverse.matrix - inverse.matrix.T) / size[:, None] / size[None, :]
    assert np.max(asymmetry) <= oracles.tolerance(np.float32, 1)


def test_replace_fills_an_empty_slot():
    g = oracles.gradients("independent", M, D)
    g[5:] = 0
    before = built(gram_of(g), 1.0)
    g[5] = g[4][::-1]
    inverse = replace(before, gram_of(g), jnp.int32(5))
    oracles.assert_close(inverse.matrix, exact(gram_of(g), 1.0), length=M, condition=100)


@pytest.mark.parametrize(
    ("factor", "is_kept"), [(1.0, True), (0.85, True), (1.15, True), (3.0, False)]
)
def test_a_shift_that_moved_is_solved_for_exactly(factor, is_kept):
    gram = gram_of(oracles.gradients("correlated", M, D))
    before, shift, rhs = built(gram, 1.0), jnp.float32(factor), jnp.arange(1.0, M + 1)
    solution, after = solve(before, gram, shift, rhs)
    condition = np.linalg.cond(exact(gram, shift))
    oracles.assert_close(
        solution, exact(gram, shift) @ np.asarray(rhs), length=1, condition=condition
    )
    assert bool(jnp.all(after.matrix == before.matrix)) == is_kept


@pytest.mark.parametrize("m", [64, 512])
@pytest.mark.parametrize("relative", [1e-2, 1e-4])
def test_a_moved_shift_does_not_cost_accuracy(m, relative):
    """Many rows are replaced first, so that ``P`` gathers rounding errors."""
    g = oracles.gradients("correlated", 2 * m, 4 * m).astype(np.float64)
    held = g[:m].copy()
    gram = held @ held.T
    shift = np.float32(relative * np.trace(gram))
    inverse = built(jnp.asarray(gram, jnp.float32), shift)
    for slot in range(min(m, 100)):
        held[slot] = g[m + slot]
        gram[slot] = gram[:, slot] = held @ held[slot]
        inverse = replace(inverse, jnp.asarray(gram, jnp.float32), jnp.int32(slot))
    rhs = jnp.arange(m) == m - 1
    single = jnp.asarray(gram, jnp.float32)
    for factor in (0.87, 0.95, 0.99, 1.01, 1.05, 1.15):
        moved = jnp.float32(factor * shift)
        solution, after = solve(inverse, single, moved, rhs.astype(jnp.float32))
        assert bool(jnp.all(after.matrix == inverse.matrix))  # P is not rebuilt
        oracles.assert_close(solution, exact(single, moved)[-1], length=m)


@pytest.mark.parametrize("what", ["empty", "NaN", "of another window"])
def test_the_solution_is_exact_whatever_the_inverse_holds(what):
    gram = gram_of(oracles.gradients("independent", M, D))
    wrong = {
        "empty": incremental.empty(M, jnp.float32),
        "NaN": incremental.IncrementalInverse(jnp.full((M, M), jnp.nan), jnp.float32(1)),
        "of another window": built(gram_of(oracles.gradients("correlated", M, D)), 1.0),
    }[what]
    rhs = jnp.ones(M)
    solution, after = solve(wrong, gram, jnp.float32(1), rhs)
    oracles.assert_close(solution, exact(gram, 1.0).sum(1), length=M, condition=100)
    oracles.assert_close(after.matrix, exact(gram, 1.0), length=M, condition=100)


def test_a_solution_is_checked_where_the_inverse_does_not_reach():
    """Slot 1 shrinks as well, by 1e4 in norm, and ``P`` knows almost nothing of it."""
    before = jnp.diag(jnp.array([1.0, 1e8], jnp.float32))
    after = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    inverse = replace(built(before, 1.0), after, jnp.int32(0))
    rhs = jnp.array([1.0, 0.0])
    solution, _ = solve(inverse, after, jnp.float32(1), rhs)
    oracles.assert_close(solution, exact(after, 1.0)[0], length=2, condition=3)


def test_no_intermediate_result_is_nan(incremental_from_one):
    with jax.debug_nans(True):
        assert not replace(incremental.empty(2), jnp.ones((2, 2)), jnp.int32(0)).matrix.any()
        tx = mfac_precondition(8)
        state, update = tx.init(jnp.zeros(20)), jax.jit(tx.update)
        for i in range(3):
            _, state = update(jnp.arange(20.0) + i, state)
    assert state.inverse.matrix.any()


@pytest.mark.jax_defaults
def test_the_contract_holds_with_an_incremental_inverse(incremental_from_one):
    """Rejected gradients, vmap, ``normalize_by="window_size"``, and mapped parameters."""
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


def test_a_window_too_singular_leaves_the_inverse_empty_and_is_still_solved(incremental_from_one):
    g = oracles.gradients("correlated", M, D)
    g[3] = g[9]
    inverse = incremental.empty(M, jnp.float32)

    @jax.jit
    def step(w, inverse, row):
        w, _ = window.push(w, row)
        return w, *window.ihvp_newest_incremental(w, 1e-7, inverse)

    w = window.init(jnp.zeros(D), M)
    for row in g:
        w, got, inverse = step(w, inverse, row)
    np.testing.assert_array_equal(inverse.matrix, jnp.zeros((M, M)))
    want = jax.jit(window.ihvp_newest)(w, 1e-7)
    oracles.assert_close(got, want, length=D, condition=1)


@pytest.mark.on_cpu
def test_a_cpu_factors_small_matrices_and_a_gpu_does_not():
    gram = gram_of(oracles.gradients("correlated", M, D))
    empty, arguments = incremental.empty(M), (gram, jnp.int32(3), jnp.float32(1))
    coefficients, after = jax.jit(incremental.newest)(empty, *arguments)
    oracles.assert_close(coefficients, exact(gram, 1.0)[3], length=M, condition=100)
    assert not after.matrix.any()
    # On a GPU the step decides whether to factor. On a CPU it always factors.
    newest = jax.jit(incremental.newest)
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
    """Counts how often the inverse is rebuilt, and takes one more step; one program for all."""
    tx = mfac_precondition(M, **DAMPINGS[damping])

    def step(i, carry, g):
        before, rebuilt = carry
        size = jnp.exp(jnp.sin(i / 500))
        _, state = tx.update(size * g[i * 37 % len(g)], before)
        slot = window.newest_slot(state.window)
        kept = incremental.replace(before.inverse, state.window.gram, slot)
        rebuilt += jnp.any(kept.matrix != state.inverse.matrix)
        return state, rebuilt

    @jax.jit
    def run(g):
        start = tx.init(jnp.zeros(D)), 0
        state, rebuilt = jax.lax.fori_loop(0, 10_000, lambda i, carry: step(i, carry, g), start)
        return rebuilt, tx.update(g[17], state)

    return run


@pytest.mark.jax_defaults
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_ten_thousand_steps_leave_no_drift(incremental_from_one, kind, damping):
    """The direction is that of a new factorization, and the inverse is rarely rebuilt."""
    g = oracles.gradients(kind, 64, D)
    rebuilt, (got, after) = ten_thousand_steps(damping)(jnp.asarray(g))
    assert int(rebuilt) < 10_000 / 20
    lam = {"fixed": 0.1, "scheduled": 0.9999**10_000}.get(damping)
    lam = float(0.01 * window.fisher_trace(after.window) if lam is None else lam)
    held = np.asarray(after.window.rows.columns(0, D), np.float64)
    want = oracles.inverse(held, lam) @ np.asarray(g[17], np.float64)
    oracles.assert_close(got, want, length=D, condition=oracles.condition(held, lam) ** 0.5)


@pytest.mark.jax_defaults
def test_the_optimizer_is_incremental_from_a_size_on(monkeypatch):
    m = optimizer.INCREMENTAL_FROM
    assert mfac_precondition(m - 1).init(jnp.zeros(1000)).inverse is None
    for d in (1000, 0, m):
        state = mfac_precondition(m).init(jnp.zeros(d))
        assert state.inverse.matrix.shape == (m, m)

    monkeypatch.setattr(incremental, "ON_CPU_FROM", 1)

    def start(incremental_from):
        monkeypatch.setattr(optimizer, "INCREMENTAL_FROM", incremental_from)
        tx = mfac_precondition(8)
        return jax.jit(tx.update), tx.init(jnp.zeros(D))

    (updates, state), (plain, other) = start(8), start(9)
    assert other.inverse is None
    for row in oracles.gradients("correlated", 20, D):
        got, state = updates(jnp.asarray(row), state)
        want, other = plain(jnp.asarray(row), other)
        oracles.assert_close(got, want, length=D, condition=10)
    # A change of the window by other means rebuilds the inverse.
    mask = jnp.arange(D) % 2 == 0
    state = state._replace(window=window.restrict(state.window, mask))
    other = other._replace(window=window.restrict(other.window, mask))
    got, state = updates(mask / jnp.arange(1.0, D + 1), state)
    want, _ = plain(mask / jnp.arange(1.0, D + 1), other)
    oracles.assert_close(got, want, length=D, condition=10)


@pytest.mark.x64
@pytest.mark.jax_defaults
@pytest.mark.parametrize(("d", "dtype"), [(8, "float32"), (0, "float32"), (D, "float64")])
def test_the_optimizer_factors_where_the_inverse_does_not_apply(incremental_from_one, d, dtype):
    tx = mfac_precondition(8)
    state, gradient = tx.init(jnp.zeros(d, dtype)), jnp.ones(d, dtype)
    _, state = jax.jit(tx.update)(gradient, state)
    assert state.inverse.matrix.shape == (8, 8)
    assert state.inverse.matrix.dtype == dtype
    assert not state.inverse.matrix.any()


def test_an_inverse_of_another_size_is_refused():
    w = window.init(jnp.zeros(5), 3)
    with pytest.raises(ValueError, match=r"window of 3 gradients, float32 .*\(3, 3\).*\(4, 4\)"):
        window.ihvp_newest_incremental(w, 1.0, incremental.empty(4, jnp.float32))
