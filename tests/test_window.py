"""The sliding window against a plain list of gradients and float64 algebra."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import outside
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_jax import reference, rows, window

D = 12
PARAMS = {"w": jnp.zeros((2, 3)), "none": None, "b": jnp.zeros(6)}
LAM = 0.1

STORAGES = {"flat": rows.Dense(), "leaf": rows.Dense(packing="leaf")}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)

LOW_PRECISION = {
    "flat": (rows.Dense(jnp.bfloat16), jnp.bfloat16),
    "leaf": (rows.Dense(jnp.bfloat16, packing="leaf"), jnp.bfloat16),
    "outside": (outside.Half(), jnp.float16),
}

push = jax.jit(window.push)
replace = jax.jit(lambda w, slot, g: window.replace(w, slot, g))
remove = jax.jit(lambda w, slot: window.remove(w, slot))
ihvp = jax.jit(lambda w, v, lam: window.ihvp(w, v, lam))
ihvp_newest = jax.jit(lambda w, lam: window.ihvp_newest(w, lam))
combination = jax.jit(
    lambda w, a, lam, refinements: window.ihvp_combination(w, a, lam, refinements=refinements),
    static_argnums=3,
)


def tree(v):
    # Leaves come in the order of their names: b, w.
    v = jnp.asarray(v, jnp.float32)
    return {"w": v[6:].reshape(2, 3), "none": None, "b": v[:6]}


def some(count, seed=0, d=D):
    return np.random.default_rng(seed).normal(size=(count, d)).astype(np.float32)


def filled(gradients, m, storage=STORAGES["flat"]):
    w = window.init(PARAMS, m, storage=storage)
    for g in gradients:
        w, _ = push(w, tree(g))
    return w


def from_matrix(gradients):
    return window.from_rows(rows.as_rows(jnp.asarray(gradients)))


def assert_is(w, held, newest=None):
    """The window stands for ``held`` and nothing else, in every answer it gives."""
    assert int(window.num_held(w)) == len(held)
    d = w.rows.layout.size
    held = np.asarray(held, np.float64).reshape(len(held), d)
    v = some(1, 99, d)[0]
    inverse = oracles.inverse(held, LAM) if len(held) else np.eye(d) / LAM
    condition = oracles.condition(held, LAM) if len(held) else 1.0
    matrix = np.asarray(w.rows.columns(0, d), np.float64)
    oracles.assert_close(w.gram, matrix @ matrix.T, length=d)
    want = inverse @ v
    lost = oracles.cancellation(v, want, LAM)
    oracles.assert_close(ihvp(w, jnp.asarray(v), LAM), want, length=d, condition=condition * lost)
    direction = oracles.flat(ihvp_newest(w, LAM))
    want = inverse @ np.asarray(newest, np.float64) if newest is not None else np.zeros(d)
    oracles.assert_close(direction, want, length=d, condition=condition)


@pytest.mark.parametrize(("m", "storage"), [(1, "flat"), (4, "flat"), (17, "flat"), (4, "leaf")])
def test_right_while_filling_and_at_every_position_of_the_ring(m, storage):
    g = some(2 * m + 1)
    w = window.init(PARAMS, m, storage=STORAGES[storage])
    assert_is(w, [])
    for i in range(len(g)):
        w, info = push(w, tree(g[i]))
        assert bool(info.accepted)
        assert int(info.slot) == i % m == int(window.newest_slot(w))
        assert_is(w, g[max(0, i + 1 - m) : i + 1], newest=g[i])
    assert int(w.rejected) == 0


@pytest.mark.parametrize("slot", [0, 2, 3])
def test_replace_any_row(slot):
    g, new = some(4), some(1, 7)[0]
    w, info = replace(filled(g, 4), slot, tree(new))
    assert int(info.slot) == slot
    g[slot] = new
    # It keeps its age: the newest is still the last that was pushed.
    assert_is(w, g, newest=g[3])
    w, info = push(w, tree(some(1, 8)[0]))
    assert int(info.slot) == 0


def test_replace_an_empty_slot_is_a_push():
    g, new = some(2), some(1, 7)[0]
    w, _ = replace(filled(g, 4), 3, tree(new))
    assert_is(w, [*g, new], newest=new)


@pytest.mark.parametrize("slot", [0, 1, 3])
def test_remove_any_row_and_push_into_the_hole(slot):
    g, new = some(4), some(1, 7)[0]
    w = remove(filled(g, 4), slot)
    kept = np.delete(g, slot, axis=0)
    assert_is(w, kept, newest=kept[-1])
    again = remove(w, slot)
    jax.tree.map(np.testing.assert_array_equal, again, w)
    w, info = push(w, tree(new))
    assert int(info.slot) == slot
    assert_is(w, [*kept, new], newest=new)


class Model:
    """The window in plain Python: a list of slots, each with a gradient and its age."""

    def __init__(self, m):
        self.slots = [None] * m

    def push(self, g):
        empty = [i for i, s in enumerate(self.slots) if s is None]
        oldest = min(range(len(self.slots)), key=lambda i: self.slots[i][1] if self.slots[i] else 0)
        self.put(empty[0] if empty else oldest, g)

    def put(self, slot, g):
        if not np.all(np.isfinite(g)):
            return
        self.slots[slot] = (g, max((s[1] for s in self.slots if s is not None), default=0) + 1)

    def replace(self, slot, g):
        held = self.slots[slot]
        if held is None:
            self.put(slot, g)
        elif np.all(np.isfinite(g)):
            self.slots[slot] = (g, held[1])

    def remove(self, slot):
        self.slots[slot] = None

    def held(self):
        return [s[0] for s in self.slots if s is not None]

    def newest(self):
        held = [s for s in self.slots if s is not None]
        return max(held, key=lambda s: s[1])[0] if held else None


SLOT = st.integers(0, 2)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.just(0)),
        st.tuples(st.just("bad"), st.just(0)),
        st.tuples(st.just("replace"), SLOT),
        st.tuples(st.just("remove"), SLOT),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40)
@given(actions=ACTIONS, seed=st.integers(0, 1000))
def test_any_history_is_that_of_a_plain_list(actions, seed):
    model, w = Model(3), window.init(PARAMS, 3)
    fresh = iter(some(len(actions), seed))
    bad = 0
    for (action, slot), g in zip(actions, fresh, strict=True):
        if action == "remove":
            model.remove(slot)
            w = remove(w, slot)
            continue
        if action == "bad":
            g[5] = np.nan
            bad += 1
        if action == "replace":
            model.replace(slot, g)
            w, _ = replace(w, slot, tree(g))
        else:
            model.push(g)
            w, _ = push(w, tree(g))
    assert_is(w, model.held(), newest=model.newest())
    assert int(w.rejected) == bad


@given(seed=st.integers(0, 1000), order=st.permutations(range(5)))
def test_m_pushes_are_a_rebuild_in_any_order(seed, order):
    g = some(5, seed)
    pushed = filled(g, 5)
    built = from_matrix(g[np.asarray(order)])
    v = some(1, 99)[0]
    want = oracles.inverse(g, LAM) @ v
    condition = oracles.condition(g, LAM) * oracles.cancellation(v, want, LAM)
    for w in (pushed, built):
        got = ihvp(w, jnp.asarray(v), LAM)
        oracles.assert_close(got, want, length=D, condition=condition)


@every_storage
def test_trees_and_flat_vectors_keep_their_form_and_dtype(storage):
    w = filled(some(4), 4, storage)
    v = some(1, 1)[0]
    as_tree = window.ihvp(w, tree(v), LAM)
    as_flat = window.ihvp(w, jnp.asarray(v), LAM)
    assert jax.tree.structure(as_tree) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(oracles.flat(as_tree), np.asarray(as_flat, np.float64))
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(v))
    out = window.ihvp(w, low, LAM)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    out = window.ihvp_newest(w, LAM)
    assert jax.tree.structure(out) == jax.tree.structure(PARAMS)


def exact(g, a, lam):
    return oracles.ihvp_combination(g, a, lam)


# m < d for every kind; m > d; one gradient.
AWKWARD = [(kind, 8, 40) for kind in oracles.KINDS]
AWKWARD += [("independent", 9, 4), ("duplicated", 9, 4), ("one row 1e6", 9, 4), ("all 1e8", 1, 40)]


@pytest.mark.parametrize(("kind", "n", "d"), AWKWARD)
def test_directions_of_awkward_gradients(kind, n, d):
    g = oracles.gradients(kind, n, d)
    w = from_matrix(g)
    for relative in (1.0, 1e-2, 1e-4):
        lam = oracles.damping_for(g, relative)
        mean = np.full(n, 1 / n, np.float32)
        newest = oracles.flat(ihvp_newest(w, lam))
        assert np.all(np.isfinite(newest))
        condition = oracles.condition(g, lam)
        oracles.assert_close(newest, exact(g, np.eye(n)[-1], lam), length=d, condition=condition)
        for refinements in (0, 1):
            got = oracles.flat(combination(w, jnp.asarray(mean), lam, refinements))
            oracles.assert_close(got, exact(g, mean, lam), length=d, condition=condition)


@pytest.mark.parametrize("kind", ["independent", "correlated", "zero rows"])
def test_against_the_recursions_of_the_paper(kind):
    g = oracles.gradients(kind, 8, 40)
    lam = oracles.damping_for(g, 1.0)
    w, v = from_matrix(g), some(1, 3, 40)[0]
    static = reference.static_ihvp(reference.static_recursion(jnp.asarray(g), lam), jnp.asarray(v))
    condition = oracles.condition(g, lam)
    lost = oracles.cancellation(v, oracles.inverse(g, lam) @ v, lam)
    got = ihvp(w, jnp.asarray(v), lam)
    oracles.assert_close(got, static, length=40, condition=condition * lost)
    dense = oracles.recursion(g, lam)
    oracles.assert_close(got, dense @ v, length=40, condition=condition * lost)
    oracles.assert_close(ihvp_newest(w, lam), dense @ g[-1], length=40, condition=condition)


# Relative errors, for v the newest and v the mean gradient, that identity 2 reaches with
# a plain Cholesky solve and an accurate Gram matrix: n = 128, d = 20,000, entries of
# about 0.01, correlated gradients of cosine 0.8. Measured with AVX-512.
MEASURED = [
    ("independent", 1e-5, 1.7e-7, 3.5e-6),
    ("correlated", 1e-3, 4.0e-6, 3.5e-6),
    ("correlated", 1e-5, 5.7e-6, 3.5e-6),
    ("correlated", 1e-7, 6.2e-6, 3.1e-6),
]


def allowance():
    """How much larger an error may be here than where it was measured.

    A sum of d terms in k lanes of a vector rounds like sqrt(d / k): 4 lanes for 16 double it.
    """
    limited = "xla_cpu_max_isa" in os.environ.get("XLA_FLAGS", "")
    processor = Path("/proc/cpuinfo")
    wide = processor.exists() and "avx512f" in processor.read_text()
    return 1 if wide and not limited else np.sqrt(16 / 4)


@functools.cache
def long_window(kind, seed):
    n, d = 128, 20_000
    rng = np.random.default_rng(seed)
    g = 0.01 * rng.normal(size=(n, d))
    if kind != "independent":
        g = 0.01 * np.sqrt(0.8) * rng.normal(size=d) + np.sqrt(0.2) * g
    g = g.astype(np.float32)
    fill = jax.jit(
        lambda w, g: jax.lax.scan(lambda w, row: (window.push(w, row)[0], None), w, g)[0]
    )
    w = fill(window.init(jnp.zeros(d), n), jnp.asarray(g))
    u, s, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    return w, u, s, vt


@pytest.mark.parametrize(("kind", "lam", "newest", "mean"), MEASURED)
def test_directions_are_as_good_as_measured(kind, lam, newest, mean):
    n = 128
    lam = float(np.float32(lam))
    for a, bound in ((np.eye(n)[-1], newest), (np.full(n, 1 / n), mean)):
        errors = []
        for seed in range(3):
            w, u, s, vt = long_window(kind, seed)
            want = (n * s / (s**2 + n * lam) * (u.T @ a)) @ vt
            got = combination(w, jnp.asarray(a, jnp.float32), lam, 0)
            errors.append(oracles.relative_error(got, want))
        assert np.median(errors) <= allowance() * bound


def test_refinement_corrects_for_the_rounding_of_the_gram_matrix():
    w, u, s, vt = long_window("correlated", 0)
    lam = float(np.float32(1e-5))
    want = (128 * s / (s**2 + 128 * lam) * u[-1]) @ vt
    newest = jnp.asarray(np.eye(128)[-1], jnp.float32)
    errors = [oracles.relative_error(combination(w, newest, lam, k), want) for k in (0, 1)]
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("relative", [1e-3, 1e-5, 1e-7])
def test_more_gradients_than_coordinates_lose_nothing(relative):
    g = oracles.gradients("independent", 48, 12)
    lam = oracles.damping_for(g, relative)
    w, v = from_matrix(g), some(1, 5, 12)[0]
    condition = np.linalg.cond(oracles.fisher(g, lam))
    assert condition < 10
    want = exact(g, np.eye(48)[-1], lam)
    oracles.assert_close(ihvp_newest(w, lam), want, length=12, condition=condition)
    want = oracles.inverse(g, lam) @ v
    oracles.assert_close(ihvp(w, jnp.asarray(v), lam), want, length=12, condition=condition)


def test_damping_may_change_from_call_to_call():
    g = some(4)
    w = filled(g, 4)
    for lam in (1e-2, 1.0, 30.0):
        want = oracles.inverse(g, float(np.float32(lam))) @ g[-1]
        condition = oracles.condition(g, lam)
        got = oracles.flat(ihvp_newest(w, jnp.float32(lam)))
        oracles.assert_close(got, want, length=D, condition=condition)


def test_denominator():
    g = some(2)
    w = filled(g, 4)
    v = some(1, 3)[0]
    for denominator in (4, jnp.float32(4)):
        inverse = oracles.inverse(g, LAM, denominator=4)
        condition = oracles.condition(g, LAM, 4)
        got = window.ihvp_newest(w, LAM, denominator=denominator)
        oracles.assert_close(oracles.flat(got), inverse @ g[-1], length=D, condition=condition)
        got = window.ihvp(w, jnp.asarray(v), LAM, denominator=denominator)
        lost = oracles.cancellation(v, inverse @ v, LAM)
        oracles.assert_close(got, inverse @ v, length=D, condition=condition * lost)


@every_storage
def test_restrict(storage):
    g = some(3)
    keep = np.arange(D) % 3 > 0
    mask = jax.tree.map(lambda x: x > 0, tree(keep.astype(np.float32)))
    w = window.restrict(filled(g, 4, storage), mask)
    assert_is(w, g * keep, newest=g[-1] * keep)


def test_fisher_trace():
    g = some(3)
    want = np.trace(g.astype(np.float64) @ g.T) / 3
    oracles.assert_close(window.fisher_trace(filled(g, 5)), want, length=D)
    assert float(window.fisher_trace(window.init(PARAMS, 2))) == 0


@every_storage
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e25])
def test_a_bad_gradient_leaves_the_window_as_it_was(bad, storage):
    w = filled(some(3), 3, storage)
    g = some(1, 7)[0]
    g[7] = bad
    for new, info in (push(w, tree(g)), replace(w, 1, tree(g))):
        assert not bool(info.accepted)
        assert int(new.rejected) == 1
        jax.tree.map(np.testing.assert_array_equal, new._replace(rejected=w.rejected), w)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_scan_over_push_is_a_loop_of_pushes(scale):
    g = some(7) * np.float32(scale)
    scanned, infos = jax.jit(lambda w, g: jax.lax.scan(lambda w, row: window.push(w, row), w, g))(
        window.init(jnp.zeros(D), 3), jnp.asarray(g)
    )
    np.testing.assert_array_equal(infos.slot, [0, 1, 2, 0, 1, 2, 0])
    lam = oracles.damping_for(g, 0.1)
    got = ihvp_newest(scanned, lam)
    condition = oracles.condition(g[-3:], lam)
    want = oracles.inverse(g[-3:], lam) @ g[-1].astype(np.float64)
    oracles.assert_close(got, want, length=D, condition=condition)


def test_vmap_over_windows():
    g = np.stack([some(3, seed) for seed in range(4)])
    empty = window.init(jnp.zeros(D), 2)
    ws = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *x.shape)), empty)
    for i in range(3):
        ws, infos = jax.jit(jax.vmap(window.push))(ws, jnp.asarray(g[:, i]))
    np.testing.assert_array_equal(infos.slot, [0] * 4)
    got = jax.jit(jax.vmap(window.ihvp_newest, (0, None)))(ws, LAM)
    for k in range(4):
        want = oracles.inverse(g[k, 1:], LAM) @ g[k, -1]
        condition = oracles.condition(g[k, 1:], LAM)
        oracles.assert_close(got[k], want, length=D, condition=condition)


@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_ten_thousand_pushes_leave_no_drift(kind):
    """Every entry of ``K`` is computed once from stored gradients: errors cannot add up."""
    m, d, pushes = 8, 40, 10_000
    g = jnp.asarray(oracles.gradients(kind, 64, d))
    steps = jnp.arange(pushes) * 37 % 64

    # One program for both runs, so that it rounds alike.
    @jax.jit
    def run(first):
        start = window.init(jnp.zeros(d), m)
        return jax.lax.fori_loop(first, pushes, lambda i, w: window.push(w, g[steps[i]])[0], start)

    long = run(0)
    # 10,000 is a multiple of m: the slots are the same, and so is every bit.
    np.testing.assert_array_equal(long.gram, run(pushes - m).gram)
    held = np.asarray(g, np.float64)[np.asarray(steps[-m:])]
    oracles.assert_close(long.gram, held @ held.T, length=d)
    got = window.ihvp_newest(long, LAM)
    oracles.assert_close(
        got, oracles.inverse(held, LAM) @ held[-1], length=d, condition=oracles.condition(held, LAM)
    )


def test_vmap_over_vectors():
    g, vs = some(3), some(5, 1)
    w = filled(g, 3)
    got = jax.vmap(lambda v: window.ihvp(w, v, LAM))(jnp.asarray(vs))
    want = vs @ oracles.inverse(g, LAM)
    lost = oracles.cancellation(vs, want, LAM)
    oracles.assert_close(got, want, length=D, condition=lost * oracles.condition(g, LAM))


@every_storage
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_window_is_not_copied(storage, dtype):
    params = {"a": jnp.zeros((64, 512)), "b": jnp.zeros(16 * 2048)}
    storage = dataclasses.replace(storage, dtype=dtype)
    shapes = jax.eval_shape(lambda: window.init(params, 128, storage=storage))
    lowered = jax.jit(window.push, donate_argnums=0).lower(shapes, params)
    memory = lowered.compile().memory_analysis()
    held = 128 * 65536 * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 4


@pytest.mark.parametrize(("storage", "dtype"), LOW_PRECISION.values(), ids=LOW_PRECISION)
def test_low_precision_windows_describe_the_gradients_as_stored(storage, dtype):
    g = some(4)
    w = window.init(PARAMS, 3, storage=storage)
    for row in g:
        w, _ = push(w, tree(row))
    stored = np.asarray(jnp.asarray(g, dtype), np.float64)[1:]
    assert w.gram.dtype == jnp.float32
    assert_is(w, stored, newest=stored[-1])


@pytest.mark.parametrize("m", [3, D + 1])
def test_a_window_asks_for_products_only(m):
    storage = outside.Half()
    w = window.init(PARAMS, m, storage=storage)
    for g in some(3):
        w, _ = push(w, tree(g))
    v = tree(some(1, 7)[0])
    w, _ = window.replace(w, 1, v)
    w = window.remove(w, 2)
    window.ihvp(w, v, LAM)
    window.ihvp_newest(w, LAM, refinements=1)
    window.restrict(w, jax.tree.map(lambda x: x > 0, v))
    assert set(storage.reads.of) == {"put", "dots", "combine", "gram"}


@pytest.mark.x64
def test_float64_windows():
    g = np.random.default_rng(0).normal(size=(5, 9))
    w = window.init(jnp.zeros(9), 3)
    for row in g:
        w, _ = push(w, jnp.asarray(row))
    assert w.gram.dtype == jnp.float64
    np.testing.assert_allclose(
        ihvp_newest(w, 1e-3), oracles.inverse(g[2:], 1e-3) @ g[-1], 1e-10, 1e-12
    )


def test_parameters_without_leaves():
    w, info = window.push(window.init({"a": None}, 2), {"a": None})
    assert bool(info.accepted)
    assert window.ihvp_newest(w, LAM) == {"a": None}


def test_static_mistakes_are_refused():
    w = filled(some(2), 3)
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        window.init(PARAMS, 0)
    with pytest.raises(TypeError, match="window_size must be a Python int, got bool"):
        window.init(PARAMS, True)
    with pytest.raises(ValueError, match=r"slot must lie in 0..2, got 3"):
        window.remove(w, 3)
    with pytest.raises(ValueError, match=r"slot must lie in 0..2, got -1"):
        window.replace(w, -1, tree(some(1)[0]))
    for damping in (0.0, -1, float("inf")):
        with pytest.raises(ValueError, match="damping must be finite and greater than 0"):
            window.ihvp_newest(w, damping)
    with pytest.raises(ValueError, match="damping must be a scalar"):
        window.ihvp_newest(w, jnp.ones(2))
    with pytest.raises(ValueError, match="denominator must be finite and greater than 0"):
        window.ihvp(w, tree(some(1)[0]), LAM, denominator=0)
    with pytest.raises(ValueError, match="refinements must be at least 0, got -1"):
        window.ihvp_newest(w, LAM, refinements=-1)
    with pytest.raises(ValueError, match=r"coefficients must have shape \(3,\).*got \(2,\)"):
        window.ihvp_combination(w, jnp.ones(2), LAM)
    with pytest.raises(ValueError, match="gradient does not have the structure"):
        window.push(w, {"w": PARAMS["w"]})
    with pytest.raises(ValueError, match=r"gradient\['w'\].*expected \(2, 3\), got \(3, 2\)"):
        window.push(w, PARAMS | {"w": jnp.zeros((3, 2))})
    with pytest.raises(TypeError, match=r"gradient\['b'\] must be a real floating-point array"):
        window.push(w, PARAMS | {"b": jnp.zeros(6, jnp.int32)})


@pytest.mark.wrong_types
def test_what_is_no_storage_and_what_are_no_writable_rows_is_refused():
    with pytest.raises(TypeError, match=r"storage must be a storage, .* got 'disk'"):
        window.init(PARAMS, 2, storage="disk")
    with pytest.raises(TypeError, match=r"rows must be gradient rows .* got dict"):
        window.from_rows(PARAMS)
    read_only = rows.StackedRows.of((rows.as_rows(jnp.eye(3)),), jnp.ones(1))
    with pytest.raises(TypeError, match=r"a window needs rows that can be written .* StackedRows"):
        window.from_rows(read_only)


@pytest.mark.parametrize("m", [4, 12])
def test_rows_in_host_memory_eagerly(m):
    """With fewer and with more gradients than parameters; pushed, replaced, removed, restricted."""
    gradients = np.random.default_rng(0).normal(size=(2 * m, 10)).astype(np.float32)
    vector, mask = jnp.asarray(gradients[0]), jnp.arange(10) != 3

    def directions(storage):
        held = window.init(jnp.zeros(10), m, storage=storage)
        for gradient in gradients:
            held, _ = window.push(held, jnp.asarray(gradient))
        held, _ = window.replace(held, 1, vector)
        held = window.restrict(window.remove(held, 2), mask)
        return window.ihvp(held, vector, 0.1), window.ihvp_newest(held, 0.1)

    for got, want in zip(directions(outside.Host()), directions(rows.Dense()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
