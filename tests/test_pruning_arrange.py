"""Blocks over the weights that are alive."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import pruning, rows
from mfac_jax.pruning._arrange import alive_first


@pytest.mark.parametrize(
    ("alive", "segments", "group", "order"),
    [
        ("10110010", ((1, 8),), 1, [0, 2, 3, 6, 1, 4, 5, 7]),
        ("10110010", ((2, 4),), 1, [0, 2, 3, 1, 6, 4, 5, 7]),
        ("00100000" + "0101", ((2, 4), (1, 4)), 2, [2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("1111", ((1, 4),), 1, [0, 1, 2, 3]),
        ("0000", ((1, 4),), 4, [0, 1, 2, 3]),
    ],
)
def test_what_is_alive_comes_first_in_every_row(alive, segments, group, order):
    mask = jnp.asarray([c == "1" for c in alive])
    assert jax.jit(alive_first, static_argnums=(1, 2))(mask, segments, group).tolist() == order


def step(w, mask, g, **options):
    return pruning.prune_step(w, mask, rows.as_rows(g, w), damping=0.05, **options)


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("update", ["joint", "reference"])
def test_blocks_that_are_filled_up_are_those_of_their_weights(n, update):
    """The last block of 17 weights holds two, the others five, which one program works on."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=17), jnp.float32)
    g = oracles.gradients("correlated", n, 17)
    options = {"score": "mfac", "update": update, "blocks": 5, "path_filter": ""}
    new, mask, info = step(w, jnp.ones(17, bool), jnp.asarray(g), sparsity=0.5, **options)
    exact = np.zeros((17, 17))
    for i in range(0, 17, 5):
        exact[i : i + 5, i : i + 5] = oracles.fisher(g[:, i : i + 5], 0.05)
    diagonal = np.diagonal(np.linalg.inv(exact))
    wide = np.asarray(w, np.float64)
    kept = np.ones(17, bool)
    kept[np.argsort(wide**2 / diagonal)[: round(0.5 * 17)]] = False
    np.testing.assert_array_equal(mask, kept)
    gone = np.where(kept, 0, wide)
    if update == "joint":
        moved = np.linalg.solve(exact[np.ix_(kept, kept)], exact[kept] @ gone)
    else:
        moved = -np.linalg.solve(exact, gone / diagonal)[kept]
    np.testing.assert_allclose(new[kept], wide[kept] + moved, rtol=1e-4, atol=1e-5)
    delta = np.asarray(new, np.float64) - wide
    want = delta @ exact @ delta / 2
    np.testing.assert_allclose(info.predicted_loss_increase, want, rtol=1e-4)


@pytest.mark.parametrize("score", ["mfac", "greedy"])
@pytest.mark.parametrize("update", ["joint", "reference"])
@pytest.mark.parametrize("storage", ["flat", "per_leaf"])
def test_a_block_is_made_of_alive_weights(score, update, storage):
    """A step from a mask is that of the alive weights by themselves."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=48), jnp.float32)
    g = oracles.gradients("correlated", 20, 48)
    alive = rng.random(48) < 0.6
    count = int(alive.sum())
    options = {"damping": 0.05, "blocks": 8, "score": score, "update": update, "path_filter": ""}
    gone = count // 2
    alone, kept, info = pruning.prune_step(
        w[alive],
        jnp.ones(count, bool),
        rows.as_rows(jnp.asarray(g[:, alive])),
        gone / count,
        **options,
    )
    params = {"a": w[:20].reshape(4, 5).T, "b": w[20:]}
    gradients = {
        "a": jnp.asarray(g[:, :20].reshape(20, 4, 5).swapaxes(1, 2)),
        "b": jnp.asarray(g[:, 20:]),
    }
    mask = {"a": jnp.asarray(alive[:20].reshape(4, 5).T), "b": jnp.asarray(alive[20:])}
    held = rows.as_rows(gradients, params, storage=storage)
    new, new_mask, new_info = pruning.prune_step(
        params, mask, held, (48 - count + gone) / 48, **options
    )
    flat = np.concatenate([np.ravel(np.transpose(new["a"])), new["b"]])
    flat_mask = np.concatenate([np.ravel(np.transpose(new_mask["a"])), new_mask["b"]])
    np.testing.assert_array_equal(flat_mask[alive], kept)
    assert not flat_mask[~alive].any()
    np.testing.assert_allclose(flat[alive], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        new_info.predicted_loss_increase, info.predicted_loss_increase, rtol=1e-4
    )
    assert int(new_info.num_pruned) == 48 - count + gone


def test_within_outputs_weights_stay_in_their_output():
    """With 3 of 12 alive in each, an output is one block of 4, whatever it was before."""
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(5, 12)), jnp.float32)
    g = oracles.gradients("correlated", 20, 60)
    alive = np.zeros((5, 12), bool)
    for row in alive:
        row[rng.choice(12, 3, replace=False)] = True
    new, mask, info = step(
        w,
        jnp.asarray(alive),
        jnp.asarray(g.reshape(20, 5, 12)),
        sparsity=1 - 10 / 60,
        blocks=pruning.WithinOutputs(4),
        output_axis=0,
        score="greedy",
    )
    kept = np.asarray(mask)
    for row in range(5):
        fisher = oracles.fisher(g.reshape(20, 5, 12)[:, row], 0.05)
        s, q = np.flatnonzero(kept[row]), np.flatnonzero(alive[row] & ~kept[row])
        moved = np.linalg.solve(fisher[np.ix_(s, s)], fisher[np.ix_(s, q)] @ np.asarray(w)[row, q])
        np.testing.assert_allclose(
            np.asarray(new)[row, s], np.asarray(w)[row, s] + moved, rtol=1e-4, atol=1e-5
        )
    assert int(info.num_alive) == 10
