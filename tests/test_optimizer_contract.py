"""What optax expects of a transformation, over every public one, option and storage.

After optax's own contract suite (its ``contrib/_common_test.py``).
"""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import outside
import pytest
from jax import lax

from mfac_jax import mfac, mfac_precondition, mfacw
from mfac_jax.optimizer import BlockWindows, ByAge, Diagonal, Direction, SecondMoments, UnitNorm
from mfac_jax.rows import Dense, Int8, Paged, TopK
from mfac_jax.window import Window

M = 3
PARAMS = {
    "w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3),
    "half": jnp.ones(2, jnp.bfloat16),
    "scalar": jnp.float32(0.5),
    "none": None,
}


def schedule(count):
    return 0.1 / (1.0 + count.astype(jnp.float32))


def alive(params):
    return jax.tree.map(lambda p: p > 0, params)


TRANSFORMS = {
    "defaults": mfac_precondition(M),
    "damping": mfac_precondition(M, 0.1, relative_damping=0.1, normalize_by="window_size"),
    "schedule": mfac_precondition(M, schedule, storage=Dense(jnp.bfloat16)),
    "leaf": mfac_precondition(M, 0.1, storage=Dense(packing="leaf"), alive=alive),
    "outside": mfac_precondition(M, 0.1, storage=outside.Half()),
    "metric": mfac_precondition(
        M, metric=SecondMoments(), direction=Direction(momentum=0.9, length=0.2, weights=UnitNorm())
    ),
    "diagonal": mfac_precondition(
        M, 0.1, metric=Diagonal(jax.tree.map(lambda p: jnp.full(p.shape, 2.0, p.dtype), PARAMS))
    ),
    "root by leaf": mfac_precondition(
        M, blocks="leaf", direction=Direction(power=0.5, weights=ByAge(0.9)), storage=outside.Half()
    ),
    "root by output": mfac_precondition(
        M,
        blocks="output_first",
        direction=Direction(power=0.5, limit=0.5),
        storage=Dense(jnp.bfloat16),
    ),
    "int8": mfac_precondition(M, 0.1, storage=Int8(4)),
    "largest": mfac_precondition(M, 0.1, storage=TopK(0.5, error_bits=4)),
    "paged": mfac_precondition(M, 0.1, storage=Paged(columns=3)),
    "mfacw, paged": mfacw(0.1, 0.1, window_size=M, storage=Paged(), blocks=None),
    "mfacw, int8": mfacw(0.1, 0.1, window_size=M, storage=Int8()),
    "mfacw, largest": mfacw(0.1, 0.1, window_size=M, storage=TopK(0.5), blocks="leaf"),
    "mfacw": mfacw(schedule, 0.1, window_size=M, alive=alive),
    "mfac": mfac(
        schedule,
        M,
        relative_damping=schedule,
        momentum=0.9,
        weight_decay=0.1,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        storage=Dense(packing="leaf"),
        alive=alive,
    ),
}

every_transform = pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)


@pytest.fixture
def optax_promotes():
    """For parts of optax that mix dtypes themselves."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradient(step, params=PARAMS):
    """A gradient that depends on the step and the parameters."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(7), step), 4)
    keys = jax.tree.unflatten(
        jax.tree.structure(params), list(keys[: len(jax.tree.leaves(params))])
    )
    return jax.tree.map(lambda p, k: p + jax.random.normal(k, p.shape, p.dtype), params, keys)


@functools.lru_cache
def jitted(tx):
    """One compiled update a transformation, for all tests."""
    return jax.jit(tx.update)


@functools.lru_cache
def loop(tx, steps=5):
    """Parameters and state after each of some steps: what the other ways must give."""
    params, state = PARAMS, tx.init(PARAMS)
    out = []
    for i in range(steps):
        updates, state = jitted(tx)(gradient(i, params), state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, state))
    return out


def assert_close(got, expected):
    # Programs that fuse differently may round a bfloat16 parameter to its neighbour, and
    # the gradients after that follow: a few times the eps of bfloat16, 2^-8.
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    low = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(expected))
    tolerance = 2e-2 if low else 1e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, "float64"), np.asarray(b, "float64"), rtol=tolerance, atol=tolerance
        )


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def copied(tree):
    return jax.tree.map(lambda x: x.copy(), tree)


def is_paged(state):
    return "pinned_host" in {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}


def compilations(state):
    """Of a step: JAX commits all results to a device if an argument is in host memory."""
    return 2 if is_paged(state) else 1


@every_transform
def test_steps_with_donated_buffers_and_extra_arguments_compile_once(tx):
    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(i, params, state):
        updates, state = tx.update(gradient(i, params), state, params, value=1.0, other=params)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        return optax.apply_updates(params, updates), state

    params, state = copied(PARAMS), tx.init(PARAMS)
    for i, (expected_params, expected_state) in enumerate(loop(tx)):
        old = jax.tree.leaves(optax.tree.get(state, "window").rows)[0]
        params, state = step(i, params, state)
        assert old.is_deleted()
        assert_close((params, state), (expected_params, expected_state))
    assert step._cache_size() == compilations(state)


@every_transform
def test_the_state_keeps_its_type(tx):
    def types(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)

    for _, state in loop(tx):
        assert types(state) == types(tx.init(PARAMS))


@every_transform
def test_scan_and_cond(tx):
    def step(carry, i):
        params, state = carry

        def take():
            updates, new = tx.update(gradient(i // 2, params), state, params)
            return optax.apply_updates(params, updates), new

        return lax.cond(i % 2 == 0, take, lambda: (params, state)), None

    run = jax.jit(lambda params, state: lax.scan(step, (params, state), jnp.arange(10))[0])
    assert_close(run(PARAMS, tx.init(PARAMS)), loop(tx)[-1])


@every_transform
def test_vmap_over_seeds(tx):
    def final(params):
        def step(carry, i):
            params, state = carry
            updates, state = tx.update(gradient(i, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = lax.scan(step, (params, tx.init(params)), jnp.arange(5))
        return params, state

    scales = jnp.array([0.5, 1.0, 2.0])
    starts = jax.vmap(lambda s: jax.tree.map(lambda p: s.astype(p.dtype) * p, PARAMS))(scales)
    run = jax.jit(jax.vmap(final))
    if is_paged(tx.init(PARAMS)):
        with pytest.raises(ValueError, match="memory_space"):
            run(starts)
        return
    params, state = run(starts)
    assert_close(jax.tree.map(lambda x: x[1], (params, state)), loop(tx)[-1])
    assert not np.allclose(params["w"][0], params["w"][2])


@every_transform
def test_the_window_is_found_and_parameters_are_mapped(tx):
    _, state = loop(tx)[-1]
    held = optax.tree.get(state, "window")
    assert isinstance(held, Window | BlockWindows)
    assert jnp.sum(held.stamps >= 0) == M

    # Only what has a leaf for each parameter is mapped: a momentum, and the rows packed by leaf.
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    rows, mapped_rows = held.rows, optax.tree.get(mapped, "window").rows
    is_by_leaf = getattr(rows, "packing", None) == "leaf"
    assert_equal(mapped_rows, jax.tree.map(lambda x: x + 1, rows) if is_by_leaf else rows)
    assert_equal(optax.tree.get(mapped, "window")._replace(rows=rows), held)
    if trace := optax.tree.get(state, "trace"):
        assert_equal(optax.tree.get(mapped, "trace"), jax.tree.map(lambda x: x + 1, trace))


@every_transform
def test_a_mapped_state_continues(tx):
    params, state = loop(tx)[-1]
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    g = gradient(9)
    # Compiled anew: a compiled update for the real state could hide a difference.
    assert_equal(jax.jit(tx.update)(g, mapped, params), jitted(tx)(g, state, params))


@every_transform
def test_a_state_is_placed_by_mapped_shardings(tx):
    _, state = loop(tx)[-1]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "a")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = optax.tree.map_params(
        tx, lambda _: everywhere, state, transform_non_params=lambda _: everywhere
    )
    placed = jax.device_put(state, shardings)
    places = [placed]
    if not is_paged(state):  # committed to the device
        places.append(jax.jit(lambda s: s, out_shardings=shardings)(state))
    for got in places:
        assert_equal(got, state)
        assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(got))


@every_transform
def test_a_state_saved_and_restored_continues_bit_for_bit(tx, tmp_path):
    params, state = loop(tx)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", (params, state))
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: (PARAMS, tx.init(PARAMS)))
        restored = checkpointer.restore(tmp_path / "saved", target)
    assert_equal(restored, (params, state))
    g = gradient(9)
    assert_equal(jitted(tx)(g, restored[1], restored[0]), jitted(tx)(g, state, params))


PART = {**PARAMS, "half": None}


@every_transform
def test_masked(tx):
    # Under optax.masked a transformation sees some of the parameters only.
    wrapped = optax.masked(tx, {"w": True, "half": False, "scalar": True, "none": None})
    g = gradient(0)
    masked, _ = jitted(wrapped)(g, wrapped.init(PARAMS), PARAMS)
    alone, _ = jitted(tx)({**g, "half": None}, tx.init(PART), PART)
    assert_equal(masked["half"], g["half"])
    assert_close({**masked, "half": None}, alone)


@every_transform
def test_multi_transform_and_chain(tx):
    parts = {"mfac": optax.chain(optax.clip_by_global_norm(1e6), tx), "sgd": optax.sgd(0.5)}
    labels = {"w": "mfac", "half": "sgd", "scalar": "mfac", "none": None}
    combined = optax.multi_transform(parts, labels)
    g = gradient(0)
    got, _ = jitted(combined)(g, combined.init(PARAMS), PARAMS)
    alone, _ = jitted(tx)({**g, "half": None}, tx.init(PART), PART)
    assert_close({**got, "half": None}, alone)
    assert_equal(got["half"], -jnp.bfloat16(0.5) * g["half"])


@every_transform
def test_multi_steps(tx, optax_promotes):
    accumulated = optax.MultiSteps(tx, every_k_schedule=2)
    update = jax.jit(accumulated.update)
    first, second = gradient(0), gradient(1)
    nothing, state = update(first, accumulated.init(PARAMS), PARAMS)
    got, _ = update(second, state, PARAMS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = jitted(tx)(mean, tx.init(PARAMS), PARAMS)
    assert_equal(nothing, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_close(got, expected)
    assert update._cache_size() == compilations(state)


@every_transform
def test_apply_if_finite(tx):
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=5)
    update = jitted(guarded)
    _, state = update(gradient(0), guarded.init(PARAMS), PARAMS)
    bad = {**gradient(1), "scalar": jnp.float32(jnp.nan)}
    updates, after = update(bad, state, PARAMS)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(after.inner_state, state.inner_state)
    assert update._cache_size() == compilations(state)


@pytest.mark.parametrize(
    ("factory", "options", "name"),
    [
        (mfac_precondition, {"damping": 0.1}, "damping"),
        (mfac_precondition, {"relative_damping": 0.1}, "relative_damping"),
        (mfac, {"learning_rate": 0.1, "damping": 0.1}, "learning_rate"),
        (mfac, {"learning_rate": 0.1, "weight_decay": 0.1}, "weight_decay"),
        (mfac, {"learning_rate": schedule, "momentum": 0.9}, "momentum"),
        (mfacw, {"learning_rate": 0.1, "weight_decay": 0.1}, "learning_rate"),
        (mfacw, {"learning_rate": 0.1, "weight_decay": 0.1}, "weight_decay"),
        (mfacw, {"learning_rate": 0.1}, "momentum"),
    ],
)
def test_inject_hyperparams(factory, options, name):
    # In parameters of one dtype: optax makes the hyperparameters arrays of the widest.
    tx = optax.inject_hyperparams(factory, static_args=("window_size",))(window_size=M, **options)
    plain = factory(window_size=M, **options)
    update = jax.jit(tx.update)
    state = tx.init(PART)
    for i in range(2):
        updates, state = update({**gradient(i), "half": None}, state, PART)
    expected_state = plain.init(PART)
    for i in range(2):
        expected, expected_state = jitted(plain)(
            {**gradient(i), "half": None}, expected_state, PART
        )
    assert_close(updates, expected)

    # A hyperparameter that is changed from outside takes effect without a compilation.
    changed = state._replace(hyperparams={**state.hyperparams, name: jnp.float32(0.7)})
    before, _ = update({**gradient(2), "half": None}, state, PART)
    after, _ = update({**gradient(2), "half": None}, changed, PART)
    assert np.max(np.abs(before["w"] - after["w"])) > 1e-3
    assert update._cache_size() == compilations(state)


def test_inject_hyperparams_without_static_args_says_what_to_do():
    with pytest.raises(TypeError, match="window_size"):
        optax.inject_hyperparams(mfac_precondition)(window_size=M).init(PART)


@pytest.mark.parametrize("name", ["bare", "linen", "nnx"])
def test_training_loops(name):
    path = Path(__file__).parents[1] / "examples" / "loops" / f"{name}.py"
    # A reader has JAX as it comes, not as the tests set it.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        first, last = runpy.run_path(str(path))["main"](steps=60)
    assert first > 0.6
    assert last < 0.5 * first
