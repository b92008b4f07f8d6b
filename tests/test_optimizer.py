"""Directions against dense float64 solves, and what odd gradients do."""

import functools
import inspect

import few_bits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import outside
import pytest
from jax import lax
from oracles import assert_close, relative_error

from mfac_jax import mfac, mfac_precondition, mfacw, window
from mfac_jax.rows import Dense, Int8, Paged, TopK

SHAPES = {"b": (4,), "w": (2, 3)}
D = 10

STORAGES = {"flat": Dense(), "leaf": Dense(packing="leaf"), "paged": Paged(columns=4)}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)

FEW_BITS = {
    "int8": Int8(4),
    "largest": TopK(0.5, block=4),
    "largest, 4 bits": TopK(0.3, block=8, error_bits=4),
}
any_storage = pytest.mark.parametrize(
    "storage", [*STORAGES.values(), *FEW_BITS.values()], ids=[*STORAGES, *FEW_BITS]
)

LOW_PRECISION = {
    "flat": (Dense(jnp.bfloat16), jnp.bfloat16),
    "leaf": (Dense(jnp.bfloat16, packing="leaf"), jnp.bfloat16),
    "outside": (outside.Half(), jnp.float16),
}


def tree_of(vectors):
    """Vectors (..., d) as a tree with the leaves of SHAPES."""
    lead = vectors.shape[:-1]
    return {"b": vectors[..., :4], "w": vectors[..., 4:].reshape(*lead, 2, 3), "none": None}


def vector_of(tree, lead):
    return np.concatenate(
        [np.asarray(leaf, "float64").reshape(*lead, -1) for leaf in jax.tree.leaves(tree)], axis=-1
    )


@functools.lru_cache
def scanner(tx):
    @jax.jit
    def scan(gradients):
        state = tx.init(jax.tree.map(lambda g: g[0], gradients))
        params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)

        def step(state, g):
            direction, state = tx.update(g, state, params)
            return state, direction

        state, directions = lax.scan(step, state, gradients)
        return directions, state

    return scan


def run(tx, gradients):
    """The directions and the last state of a scan over a stack of gradients."""
    return scanner(tx)(gradients)


def dense_directions(vectors, m, damping, normalize_by="count"):
    """``F^-1 g`` step by step, by solves with the d x d matrix; and the worst condition."""
    out, condition = [], 1.0
    for t in range(len(vectors)):
        held = vectors[max(0, t + 1 - m) : t + 1]
        n = len(held) if normalize_by == "count" else m
        lam = damping(t, held) if callable(damping) else damping
        fisher = lam * np.eye(vectors.shape[1]) + held.T @ held / n
        condition = max(condition, np.linalg.cond(fisher))
        out.append(np.linalg.solve(fisher, vectors[t]))
    return np.stack(out), condition


def assert_directions(got, expected, condition, dtype="float32"):
    """Every direction, each for itself, to the accuracy of its solve."""
    for direction, want in zip(np.atleast_2d(got), np.atleast_2d(expected), strict=True):
        assert_close(direction, want, length=D, condition=condition, dtype=dtype)


def make_vectors(steps, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, D))


# While it fills, when it is full, and when it has wrapped around more than once; a
# window of one gradient, one that no 32 divides and one of more gradients than weights.
@every_storage
@pytest.mark.parametrize(("m", "steps"), [(1, 4), (5, 13), (33, 70)])
def test_directions(m, steps, storage):
    vectors = make_vectors(steps).astype("float32")
    directions, state = run(mfac_precondition(m, 0.1, storage=storage), tree_of(vectors))
    expected, condition = dense_directions(vectors.astype("float64"), m, 0.1)
    assert_directions(vector_of(directions, (steps,)), expected, condition)
    assert state.count == steps
    assert window.num_held(state.window) == m


@pytest.mark.parametrize(("storage", "dtype"), LOW_PRECISION.values(), ids=LOW_PRECISION)
def test_directions_of_a_window_in_low_precision(storage, dtype):
    vectors = make_vectors(9).astype("float32")
    directions, state = run(mfac_precondition(4, 0.1, storage=storage), tree_of(vectors))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.window.rows)} == {jnp.dtype(dtype)}
    # The direction is that of the gradients as stored, to float32 accuracy.
    stored = np.asarray(vectors.astype(dtype), "float64")
    expected, condition = dense_directions(stored, 4, 0.1)
    assert_directions(vector_of(directions, (9,)), expected, condition)


@pytest.mark.parametrize("storage", FEW_BITS.values(), ids=FEW_BITS)
def test_directions_of_a_compressed_window(storage):
    vectors = make_vectors(9).astype("float32")
    directions, _ = run(mfac_precondition(4, 0.1, storage=storage), tree_of(vectors))
    model = few_bits.Model(storage)
    expected, condition = dense_directions(np.stack([model(v) for v in vectors]), 4, 0.1)
    assert_directions(vector_of(directions, (9,)), expected, condition)


@pytest.mark.x64
@every_storage
def test_directions_in_float64(storage):
    vectors = make_vectors(9)
    directions, _ = run(mfac_precondition(4, 1e-3, storage=storage), tree_of(vectors))
    expected, condition = dense_directions(vectors, 4, 1e-3)
    assert directions["b"].dtype == jnp.float64
    assert_directions(vector_of(directions, (9,)), expected, condition, "float64")


def test_a_step_reads_the_gradients_twice():
    # Once as the gradient is written, and once for the direction.
    storage = outside.Half()
    tx = mfac_precondition(4, storage=storage)
    g = tree_of(make_vectors(1)[0].astype("float32"))
    jax.jit(tx.update).lower(g, tx.init(g))
    assert storage.reads.of == {"put": 1, "combine": 1}


def test_the_papers_algorithm():
    # Defaults of the paper's code: damping 1e-5, and a sum over the gradients so far that
    # is divided by m from the first step on. Equation 4: with F_0 = lambda I,
    # F_i^-1 = F_{i-1}^-1 - (F_{i-1}^-1 g_i)(F_{i-1}^-1 g_i)^T / (m + g_i^T F_{i-1}^-1 g_i).
    m, steps, lam = 8, 12, 1e-5
    vectors = (0.01 * make_vectors(steps)).astype("float32")
    tx = mfac_precondition(m, lam, normalize_by="window_size")
    directions, _ = run(tx, tree_of(vectors))
    expected = []
    for t in range(steps):
        inverse = np.eye(D) / lam
        for g in vectors[max(0, t + 1 - m) : t + 1].astype("float64"):
            image = inverse @ g
            inverse -= np.outer(image, image) / (m + g @ image)
        expected.append(inverse @ vectors[t])
    dense, condition = dense_directions(vectors.astype("float64"), m, lam, "window_size")
    np.testing.assert_allclose(np.stack(expected), dense, rtol=1e-9)
    assert_directions(vector_of(directions, (steps,)), np.stack(expected), condition)


def test_normalization_differs_only_while_the_window_fills():
    vectors = make_vectors(7).astype("float32")
    by_count, _ = run(mfac_precondition(4, 0.1), tree_of(vectors))
    by_size, _ = run(mfac_precondition(4, 0.1, normalize_by="window_size"), tree_of(vectors))
    difference = np.abs(vector_of(by_count, (7,)) - vector_of(by_size, (7,))).max(axis=1)
    assert np.all(difference[:3] > 1e-3)
    assert np.all(difference[3:] < 1e-5)


def test_damping_may_be_a_schedule():
    def schedule(count):
        return 0.5 * jnp.float32(0.5) ** count.astype(jnp.float32)

    vectors = make_vectors(6).astype("float32")
    directions, _ = run(mfac_precondition(4, schedule), tree_of(vectors))
    expected, condition = dense_directions(
        vectors.astype("float64"), 4, lambda t, held: 0.5 * 0.5**t
    )
    assert_directions(vector_of(directions, (6,)), expected, condition)


def test_damping_may_be_traced():
    vectors = make_vectors(6).astype("float32")

    @jax.jit
    def last_direction(damping):
        tx = mfac_precondition(4, damping)
        state = tx.init(tree_of(vectors[0]))
        for vector in vectors:
            direction, state = tx.update(tree_of(vector), state)
        return direction

    for damping in (0.1, 1.0):
        expected, condition = dense_directions(vectors.astype("float64"), 4, damping)
        got = vector_of(last_direction(jnp.float32(damping)), ())
        assert_directions(got, expected[-1], condition)


def test_relative_damping_is_a_share_of_the_trace():
    vectors = make_vectors(6).astype("float32")
    tx = mfac_precondition(4, 0.05, relative_damping=0.2)
    directions, _ = run(tx, tree_of(vectors))
    expected, condition = dense_directions(
        vectors.astype("float64"),
        4,
        lambda t, held: 0.05 + 0.2 * np.sum(held**2) / len(held),
    )
    assert_directions(vector_of(directions, (6,)), expected, condition)


def test_relative_damping_does_not_know_the_scale_of_the_loss():
    vectors = make_vectors(6).astype("float32")
    tx = mfac_precondition(4, relative_damping=0.01)
    plain, _ = run(tx, tree_of(vectors))
    for scale in (2.0**-30, 2.0**20):
        scaled, _ = run(tx, tree_of(np.float32(scale) * vectors))
        np.testing.assert_allclose(
            scale * vector_of(scaled, (6,)), vector_of(plain, (6,)), rtol=1e-5, atol=1e-7
        )


@any_storage
def test_bad_gradients_are_left_out_and_counted(storage):
    bad = {3: np.nan, 6: np.inf, 7: -np.inf, 9: 1e30}
    vectors = make_vectors(12).astype("float32")
    good = np.setdiff1d(np.arange(12), list(bad))
    for step, value in bad.items():
        vectors[step, step - 2] = value
    tx = mfac_precondition(4, 0.1, storage=storage)
    directions, state = run(tx, tree_of(vectors))
    clean_directions, clean_state = run(tx, tree_of(vectors[good]))
    got = vector_of(directions, (12,))
    assert np.all(got[list(bad)] == 0)
    np.testing.assert_allclose(got[good], vector_of(clean_directions, (8,)), rtol=1e-5)
    assert state.window.rejected == len(bad)
    assert state.count == 12
    jax.tree.map(
        np.testing.assert_array_equal,
        state.window._replace(rejected=jnp.int32(0)),
        clean_state.window,
    )


def test_a_bad_first_gradient_does_no_harm():
    vectors = make_vectors(3).astype("float32")
    vectors[0] = np.nan
    directions, _ = run(mfac_precondition(4), tree_of(vectors))
    got = vector_of(directions, (3,))
    assert np.all(got[0] == 0)
    assert np.all(np.isfinite(got))
    assert np.all(np.linalg.norm(got[1:], axis=1) > 0)


@pytest.mark.parametrize("options", [{}, {"damping": 1e-3, "storage": STORAGES["leaf"]}])
def test_zero_gradients(options):
    # At the start, in the middle, and the whole window full of them.
    vectors = make_vectors(12).astype("float32")
    vectors[[0, 1, 4, 7, 8, 9, 10]] = 0
    directions, state = run(mfac_precondition(3, **options), tree_of(vectors))
    got = vector_of(directions, (12,))
    assert np.all(np.isfinite(got))
    zero = np.all(vectors == 0, axis=1)
    assert np.all(got[zero] == 0)
    assert np.all(np.linalg.norm(got[~zero], axis=1) > 0)
    assert state.window.rejected == 0


def test_repeated_gradients():
    # F^-1 g = g / (lambda + |g|^2) whatever the number of copies, singular as K is.
    repeats = 20
    g = make_vectors(1).astype("float32")
    directions, _ = run(mfac_precondition(8, 1e-4), tree_of(np.repeat(g, repeats, axis=0)))
    expected = g.astype("float64") / (1e-4 + np.sum(g.astype("float64") ** 2))
    np.testing.assert_allclose(
        vector_of(directions, (repeats,)), np.repeat(expected, repeats, axis=0), rtol=1e-4
    )


@pytest.mark.parametrize("as_function", [False, True])
def test_a_mask_restricts_gradients_and_directions(as_function):
    keep = np.arange(D) % 3 != 0
    mask = tree_of(keep)
    vectors = make_vectors(7).astype("float32")
    # A weight that is dead may have any gradient.
    vectors[2, 0] = np.nan
    tx = mfac_precondition(3, 0.1, alive=(lambda params: mask) if as_function else mask)
    directions, state = run(tx, tree_of(vectors))
    expected, condition = dense_directions(np.where(keep, vectors, 0).astype("float64"), 3, 0.1)
    got = vector_of(directions, (7,))
    assert_directions(got, expected, condition)
    assert np.all(got[:, ~keep] == 0)
    assert state.window.rejected == 0
    assert np.all(np.asarray(state.window.rows.columns(0, D))[:, ~keep] == 0)


def test_masked_weights_get_no_weight_decay_and_no_momentum():
    # The mask is where the parameters are not zero, and loses a weight on the way.
    tx = mfac(0.1, 2, 1.0, weight_decay=0.5, momentum=0.9, alive=lambda p: {"w": p["w"] != 0})
    params = {"w": jnp.array([1.0, 1.0, 1.0, 0.0])}
    update = jax.jit(tx.update)
    updates, state = update({"w": jnp.ones(4)}, tx.init(params), params)
    # F^-1 g = g / (1 + |g|^2) for the three weights alive.
    np.testing.assert_allclose(updates["w"], [-0.075, -0.075, -0.075, 0.0], rtol=1e-5)
    params = {"w": jnp.array([1.0, 1.0, 0.0, 0.0])}
    updates, state = update({"w": jnp.zeros(4)}, state, params)
    np.testing.assert_allclose(updates["w"], [-0.0725, -0.0725, 0.0, 0.0], rtol=1e-5)


@pytest.mark.parametrize("make", [mfac, mfacw])
def test_the_mask_says_which_weights_decay(make):
    """As that of optax.adamw does; all weights are trained."""
    params = {"b": jnp.ones(3), "w": jnp.ones((3, 2))}

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    steps = []
    for decay in (0.0, 0.5):
        tx = make(1e-2, weight_decay=decay, mask=matrices if decay else None)
        steps.append(tx.update(params, tx.init(params), params)[0])
    without, with_decay = steps
    assert (without["b"] < 0).all()
    np.testing.assert_array_equal(with_decay["b"], without["b"])
    np.testing.assert_allclose(with_decay["w"], without["w"] - 5e-3, rtol=1e-5)


def test_a_mask_without_a_decay():
    with pytest.raises(ValueError, match="which weights decay, but weight_decay is 0; alive"):
        mfac(0.1, mask={"w": True})


def test_mfac_is_precondition_momentum_decay_and_learning_rate():
    vectors = make_vectors(6).astype("float32")
    params = tree_of(np.ones(D, "float32"))
    parts = optax.chain(
        mfac_precondition(4, 0.1),
        optax.trace(0.9),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(0.5),
    )
    ready = mfac(0.5, 4, 0.1, momentum=0.9, weight_decay=0.01)
    states = parts.init(params), ready.init(params)
    updates = jax.jit(lambda g, s, p: (parts.update(g, s[0], p), ready.update(g, s[1], p)))
    for vector in vectors:
        (expected, first), (got, second) = updates(tree_of(vector), states, params)
        states = first, second
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


@every_storage
def test_leaves_keep_their_dtype(storage):
    params = {
        "half": jnp.ones(3, jnp.bfloat16),
        "single": jnp.ones((2, 2), jnp.float32),
        "scalar": jnp.ones((), jnp.float16),
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }
    tx = mfac(0.1, 3, momentum=0.9, weight_decay=0.1, storage=storage)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    rows = optax.tree.get(state, "window").rows
    assert {leaf.dtype for leaf in jax.tree.leaves(rows)} <= {jnp.dtype("float32"), jnp.dtype(bool)}


@pytest.mark.parametrize("params", [(), {"a": None, "b": {}}])
@any_storage
def test_trees_without_leaves(params, storage):
    tx = mfac(0.1, 3, momentum=0.9, storage=storage)
    update = jax.jit(tx.update)
    updates, state = update(params, tx.init(params), params)
    updates, state = update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_small_damping_on_correlated_gradients():
    # The identity with a subtraction loses every digit here (relative error above 1).
    rng = np.random.default_rng(0)
    vectors = (0.01 * (2 * rng.normal(size=D) + rng.normal(size=(20, D)))).astype("float32")
    directions, _ = run(mfac_precondition(6, 1e-7), tree_of(vectors))
    expected, _ = dense_directions(vectors.astype("float64"), 6, 1e-7)
    got = vector_of(directions, (20,))
    assert max(map(relative_error, got, expected)) < 1e-3


ERRORS = [
    ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
    ({"window_size": -3}, ValueError, "window_size must be at least 1, got -3"),
    ({"window_size": 4.0}, TypeError, "window_size must be a Python int, got float"),
    ({"window_size": True}, TypeError, "window_size must be a Python int, got bool"),
    ({"window_size": jnp.int32(4)}, TypeError, r"static_args=\('window_size',\)"),
    ({"damping": 0.0}, ValueError, "damping must be finite and greater than 0, got 0.0"),
    ({"damping": -1.0}, ValueError, "damping must be finite and greater than 0, got -1.0"),
    ({"damping": np.nan}, ValueError, "damping must be finite and greater than 0, got nan"),
    ({"damping": np.inf}, ValueError, "damping must be finite"),
    ({"damping": "1e-5"}, TypeError, "damping must be a number or a scalar array, got str"),
    ({"damping": jnp.ones(2)}, ValueError, r"damping must be a scalar, got .* shape \(2,\)"),
    ({"relative_damping": 0}, ValueError, "relative_damping must be finite and greater than 0"),
    ({"normalize_by": "n"}, ValueError, "normalize_by must be one of 'count', 'window_size'"),
    ({"storage": "flat"}, TypeError, "storage must be a storage, .* got 'flat'"),
    ({"storage": jnp.bfloat16}, TypeError, "storage must be a storage, .* got <class"),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_bad_options_are_named(options, error, message):
    # Without the type checker of the tests, which would speak first.
    with pytest.raises(error, match=message):
        inspect.unwrap(mfac_precondition)(**options)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(2, jnp.int32)}, r"params\['w'\] .* got int32\[2\]"),
        ({"w": jnp.ones(2, jnp.complex64)}, r"params\['w'\] .* got complex64\[2\]"),
        ({"w": "text"}, r"params\['w'\] must be an array, got str"),
    ],
)
def test_parameters_that_are_not_real_are_named(params, message):
    with pytest.raises(TypeError, match=message):
        mfac(0.1, 2).init(params)


@every_storage
@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        ({"w": jnp.ones((3, 2)), "b": jnp.ones(4)}, ValueError, r"gradient\['w'\] has the wrong"),
        ({"w": jnp.ones(6), "b": jnp.ones(4)}, ValueError, r"expected \(2, 3\), got \(6,\)"),
        ({"w": jnp.ones((2, 3))}, ValueError, "gradient does not have the structure"),
        ({"w": jnp.ones((2, 3)), "c": jnp.ones(4)}, ValueError, "does not have the structure"),
        (jnp.ones(10), ValueError, "does not have the structure"),
        ({"w": jnp.ones((2, 3)), "b": jnp.ones(4, int)}, TypeError, r"gradient\['b'\].*int32"),
    ],
)
def test_gradients_that_do_not_fit_are_named(gradient, error, message, storage):
    tx = mfac_precondition(2, storage=storage)
    state = tx.init({"w": jnp.ones((2, 3)), "b": jnp.ones(4)})
    with pytest.raises(error, match=message):
        tx.update(gradient, state)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"b": jnp.ones(4, bool)}, ValueError, "alive does not have the structure"),
        ({"w": jnp.ones(3, bool)}, ValueError, r"alive\['w'\] has the wrong shape"),
        ({"w": jnp.ones(4)}, TypeError, r"alive\['w'\] must be boolean, got float32"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, error, message):
    params = {"w": jnp.ones(4)}
    tx = mfac_precondition(2, alive=mask)
    with pytest.raises(error, match=message):
        tx.update(params, tx.init(params), params)


def test_a_mask_function_needs_the_parameters():
    params = {"w": jnp.ones(4)}
    tx = mfac_precondition(2, alive=lambda p: {"w": p["w"] != 0})
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("make", [mfac_precondition, lambda **options: mfac(0.1, **options)])
def test_rows_that_jit_cannot_trace_are_refused_before_the_first_step(make):
    tx = make(window_size=4, storage=outside.Host())
    with pytest.raises(TypeError, match=r"window under jit needs .* got storage=Host\(\)"):
        tx.init(jnp.ones(3))


@pytest.mark.parametrize("options", [{}, {"blocks": "leaf"}, {"blocks": "output"}])
def test_a_first_gradient_of_zeros_is_a_step_of_zeros(options):
    tx = mfac_precondition(4, **options)
    zeros = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    state = tx.init(zeros)
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update(zeros, state)
        assert not any(bool(x.any()) for x in jax.tree.leaves(updates))
        updates, _ = update(jax.tree.map(jnp.ones_like, zeros), after)
        assert all(bool((x > 0).all()) for x in jax.tree.leaves(updates))
