"""Training under a mask: pruned weights stay at zero whatever the optimizer does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import mfac_jax
from mfac_jax import pruning, window

# Adam of optax wants the usual promotion of dtypes.
pytestmark = pytest.mark.jax_defaults

OPTIMIZERS = {
    "momentum and decay": lambda: optax.chain(
        optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "adamw": lambda: optax.adamw(1e-2),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "mfac": lambda: mfac_jax.mfac(0.05, 4),
    "mfac of some": lambda: optax.chain(
        optax.masked(mfac_jax.mfac_precondition(4, 0.1), {"w": True, "b": False}), optax.sgd(0.05)
    ),
    "mfac in parts": lambda: optax.multi_transform(
        {"m": mfac_jax.mfac(0.05, 4), "s": optax.sgd(0.05)}, {"w": "m", "b": "s"}
    ),
}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "b": jnp.zeros(4)}
    mask = {"w": jnp.asarray(rng.random((6, 4)) > 0.5), "b": jnp.asarray(True)}
    x = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)

    def loss(params):
        return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)

    return params, mask, loss


def train(tx, params, state, loss, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state, step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_and_the_others_learn(problem, name):
    params, mask, loss = problem
    tx = pruning.sparse(OPTIMIZERS[name](), mask)
    before = loss(jax.tree.map(lambda w, m: jnp.where(m, w, 0.0), params, mask))
    new, state, _ = train(tx, params, tx.init(params), loss, 15)
    assert np.all(np.asarray(new["w"])[~np.asarray(mask["w"])] == 0)
    assert loss(new) < before or name == "noise"
    assert state.mask["b"].shape == (4,)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_mask_in_mid_training_compiles_nothing_anew(problem, name):
    params, mask, loss = problem
    tx = pruning.sparse(OPTIMIZERS[name]())
    params, state, step = train(tx, params, tx.init(params), loss, 6)
    state = pruning.set_mask(state, mask)
    for _ in range(6):
        params, state = step(params, state)
    assert np.all(np.asarray(params["w"])[~np.asarray(mask["w"])] == 0)
    assert step._cache_size() == 1


def test_a_new_mask_takes_what_is_pruned_out_of_the_window(problem):
    params, mask, loss = problem
    tx = pruning.sparse(mfac_jax.mfac_precondition(4, 0.1))
    state = tx.init(params)
    grads = [jax.grad(loss)(jax.tree.map(lambda w, i=i: w + 0.1 * i, params)) for i in range(5)]
    for g in grads[:4]:
        _, state = tx.update(g, state, params)
    state = pruning.set_mask(state, mask)
    updates, state = tx.update(grads[4], state, params)

    held = window.init(params, 4)
    for g in grads:
        kept = jax.tree.map(lambda x, m: jnp.where(m, x, 0.0), g, mask)
        held, _ = window.push(held, kept)
    want = window.ihvp_newest(held, 0.1)
    alive = np.asarray(mask["w"])
    np.testing.assert_allclose(
        np.asarray(updates["w"])[alive], np.asarray(want["w"])[alive], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(
        np.asarray(updates["w"])[~alive], -np.asarray(params["w"])[~alive]
    )


def test_states_inside_a_chain_and_a_checkpoint(problem, tmp_path):
    params, mask, loss = problem
    tx = optax.chain(optax.clip(10.0), pruning.sparse(optax.adam(1e-2)))
    params, state, _ = train(tx, params, tx.init(params), loss, 3)
    state = pruning.set_mask(state, mask)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert not bool(back[1].mask["w"].all())


def test_dtypes_are_kept(problem):
    params, mask, _ = problem
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    tx = pruning.sparse(optax.sgd(0.1, momentum=0.9), mask)
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    new = optax.apply_updates(params, updates)
    assert np.all(np.asarray(new["w"])[~np.asarray(mask["w"])] == 0)


def test_what_is_wrong_is_said(problem):
    params, mask, _ = problem
    tx = pruning.sparse(optax.sgd(0.1))
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="must hold a state"):
        pruning.set_mask(optax.adam(1e-3).init(params), mask)
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(4, 6\)"):
        pruning.set_mask(state, {**mask, "w": jnp.ones((4, 6), bool)})
    flat = pruning.sparse(optax.flatten(mfac_jax.mfac_precondition(4, 0.1))).init(params)
    with pytest.raises(ValueError, match=r"window .* expected some of \['b'\], \['w'\]"):
        pruning.set_mask(flat, mask)
    with pytest.raises(TypeError, match="must be boolean"):
        pruning.sparse(optax.sgd(0.1), jax.tree.map(lambda w: w * 0, params)).init(params)
    update = functools.partial(pruning.sparse, optax.sgd(0.1))
    with pytest.raises(ValueError, match="structure"):
        update({"w": True}).init(params)


def test_narrow_updates_leave_nothing_of_a_pruned_weight():
    params = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    tx = pruning.sparse(optax.sgd(0.1), jnp.zeros(64, bool))
    updates, _ = tx.update(jnp.ones(64, jnp.bfloat16), tx.init(params), params)
    assert not np.any(optax.apply_updates(params, updates))
