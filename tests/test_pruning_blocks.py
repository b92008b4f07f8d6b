"""Blocks of the Fisher: over the weights that are alive, and within outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import pruning, rows
from mfac_jax.pruning import Scope, _blocks
from mfac_jax.pruning._scope import select


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
    assert (
        jax.jit(_blocks.alive_first, static_argnums=(1, 2))(mask, segments, group).tolist() == order
    )


def step(w, mask, g, scope, **options):
    return pruning.prune_step(w, mask, rows.as_rows(g, w), damping=0.05, scope=scope, **options)


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("update", ["joint", "reference"])
def test_blocks_that_are_filled_up_are_those_of_their_weights(n, update):
    """The last block of 17 weights holds two, the others five, which one program works on."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=17), jnp.float32)
    g = oracles.gradients("correlated", n, 17)
    options = {"score": "mfac", "update": update, "blocks": 5, "sparsity": 0.5}
    scope = Scope(path_filter="")
    new, mask, info = step(w, jnp.ones(17, bool), jnp.asarray(g), scope, **options)
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
@pytest.mark.parametrize("packing", ["flat", "leaf"])
def test_a_block_is_made_of_alive_weights(score, update, packing):
    """A step from a mask is that of the alive weights by themselves."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=48), jnp.float32)
    g = oracles.gradients("correlated", 20, 48)
    alive = rng.random(48) < 0.6
    count = int(alive.sum())
    options = {"damping": 0.05, "blocks": 8, "score": score, "update": update}
    options["scope"] = Scope(path_filter="")
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
    held = rows.as_rows(gradients, params, storage=rows.Dense(packing=packing))
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
        Scope(output_axis=0),
        sparsity=1 - 10 / 60,
        blocks=pruning.WithinOutputs(4),
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


def within(shapes, most, **options):
    params = [jnp.zeros(shape) for shape in shapes]
    selection = select(Scope(path_filter="", **options), params)
    return _blocks.blocks_under(
        _blocks.cut_into_blocks(pruning.WithinOutputs(most), selection),
        selection,
        pruning.initial_mask(params),
    )


@pytest.mark.parametrize(
    ("shapes", "most", "options", "sizes"),
    [
        ([(3, 3, 4, 2)], 144, {}, [36] * 2),
        ([(3, 3, 4, 2)], 18, {}, [18] * 4),
        ([(3, 3, 4, 2)], 17, {}, [12] * 6),
        ([(3, 3, 4, 2)], 100, {"output_axis": 0}, [24] * 3),
        ([(12, 5), (7,)], 6, {}, [6] * 11 + [1]),
        ([(12, 5)], 7, {"pattern": pruning.NofM(2, 4)}, [4] * 15),
        ([(12, 5)], 8, {"pattern": pruning.NofM(2, 4)}, [4] * 15),
        ([(16, 3), (0, 3)], 8, {"pattern": pruning.BlocksOf(4)}, [8] * 6),
        # Inputs that are a prime number cannot be cut evenly.
        ([(31, 2)], 10, {}, [10] * 6 + [2]),
        ([(6, 4)], 4, {"pattern": pruning.BlocksOf(2, axis=-1)}, [4] * 6),
    ],
)
def test_blocks_hold_weights_of_one_output(shapes, most, options, sizes):
    assert within(shapes, most, **options).sizes.tolist() == sizes


def test_the_coordinates_of_blocks_are_those_of_an_output():
    """Two kernels of Flax, between which a leaf that is not prunable has coordinates."""
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(5), "c": jnp.zeros((2, 2, 2, 2))}
    selection = select(Scope(), params)
    blocks = _blocks.cut_into_blocks(pruning.WithinOutputs(4), selection)
    found = _blocks.blocks_under(blocks, selection, pruning.initial_mask(params))
    assert found.sizes.tolist() == [3, 3, 4, 4, 4, 4]
    places = {"a": np.arange(6).reshape(3, 2), "c": np.arange(11, 27).reshape(2, 2, 2, 2)}
    # Output by output; inputs before the places of a convolution.
    want = [places["a"].T.ravel(), places["c"].transpose(3, 2, 0, 1).ravel()]
    np.testing.assert_array_equal(found.order, np.concatenate(want))


@pytest.mark.parametrize("output_axis", [0, -1])
def test_blocks_of_leaves_are_neighbours_where_they_lie(output_axis):
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(5), "c": jnp.zeros((4, 2))}
    selection = select(Scope(output_axis=output_axis), params)
    blocks = _blocks.cut_into_blocks("leaf", selection)
    found = _blocks.blocks_under(blocks, selection, pruning.initial_mask(params))
    assert found.order is None
    assert [(run.start, run.count, run.size) for run in found.runs] == [(0, 1, 6), (11, 1, 8)]


def test_a_step_within_outputs_is_one_with_the_sizes():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 8, 5)), jnp.float32)}
    gradients = jnp.asarray(oracles.gradients("correlated", 16, 120).reshape(16, 3, 8, 5))
    g = rows.as_rows({"w": gradients}, params)
    mask = pruning.initial_mask(params)
    results = [
        pruning.prune_step(params, mask, g, 0.6, damping=0.01, score="greedy", blocks=blocks)
        for blocks in (pruning.WithinOutputs(12), [12] * 10)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_where_outputs_mean_nothing():
    with pytest.raises(ValueError, match="most must be at least 1"):
        pruning.WithinOutputs(0)
    with pytest.raises(ValueError, match="blocks='leaf'"):
        pruning.prune_step(
            {"w": jnp.ones((4, 4))},
            {"w": jnp.ones((4, 4), bool)},
            rows.as_rows({"w": jnp.ones((2, 4, 4))}),
            0.5,
            damping=0.1,
            blocks=pruning.WithinOutputs(),
            scope=Scope(pattern=pruning.Slices()),
        )
