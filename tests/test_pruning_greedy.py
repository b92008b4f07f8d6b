"""Greedy removal inside blocks, against the same steps in dense float64 algebra."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import pruning, rows
from mfac_jax.pruning import _greedy


def naive(inverse, w, alive, size=1, quota=None):
    """The order of removal and what each costs, block by block, on dense matrices."""
    inverse, w, left = inverse.copy(), w * alive, alive.copy()
    scores = np.where(alive, np.inf, 0.0)
    last = 0.0
    while True:
        best, cheapest = None, np.inf
        for start in range(0, len(w), size):
            group = np.arange(start, start + size)
            gone = (~left[group]).sum()
            if quota is not None:
                options = [np.array([q]) for q in group if left[q] and gone < quota]
            else:
                options = [group] if left[group].any() else []
            for q in options:
                cost = w[q] @ np.linalg.solve(inverse[np.ix_(q, q)], w[q]) / 2
                if cost < cheapest:
                    best, cheapest = q, cost
        if best is None:
            return scores
        last = max(last, cheapest)
        scores[best] = np.where(left[best], last, scores[best])
        left[best] = False
        solved = np.linalg.solve(inverse[np.ix_(best, best)], inverse[best])
        w = w - solved.T @ w[best]
        inverse = inverse - inverse[:, best] @ solved
        inverse[best] = inverse[:, best] = 0
        inverse[best, best] = 1.0


@pytest.mark.parametrize("kind", ["independent", "correlated", "duplicated", "zero rows"])
@pytest.mark.parametrize(("size", "quota"), [(1, None), (4, None), (4, 2), (4, 3)])
@pytest.mark.parametrize("n", [4, 40])
def test_records_are_those_of_removal_one_by_one(kind, size, quota, n):
    rng = np.random.default_rng(3)
    blocks, side = 3, 16
    alive = np.repeat(rng.random((blocks, side // 4)) > 0.2, 4, axis=1)
    g = (
        oracles.gradients(kind, n, blocks * side).reshape(n, blocks, side).swapaxes(0, 1)
        * alive[:, None]
    )
    damping = oracles.damping_for(g.reshape(-1, side), 0.1)
    fisher = damping * np.eye(side) + np.einsum("bni,bnj->bij", g, g, dtype=np.float64) / n
    inverse = np.linalg.inv(fisher)
    w = rng.normal(size=(blocks, side))
    got = _greedy.greedy_scores(
        jnp.asarray(inverse, jnp.float32),
        jnp.asarray(w, jnp.float32),
        jnp.asarray(alive),
        jnp.asarray(1 / np.diagonal(fisher, axis1=1, axis2=2), jnp.float32),
        size=size,
        quota=quota,
    )
    w32 = np.asarray(w, np.float32).astype(np.float64)
    want = np.stack([naive(*block, size, quota) for block in zip(inverse, w32, alive, strict=True)])
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(np.asarray(got)[finite], want[finite], rtol=2e-3)


def test_scores_do_not_depend_on_the_batch_or_the_order_of_the_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    blocks, side = 7, 40  # more removals than the inverse waits for
    g = rng.normal(size=(blocks, 60, side))
    alive = rng.random((blocks, side)) < np.linspace(0, 1, blocks)[:, None]  # none in the first
    g = g * alive[:, None]
    fisher = 0.1 * np.eye(side) + np.einsum("bni,bnj->bij", g, g) / 60
    inverse, w = np.linalg.inv(fisher), rng.normal(size=(blocks, side))
    arrays = [inverse, w, alive, 1 / np.diagonal(fisher, axis1=1, axis2=2)]
    arrays = [jnp.asarray(x, bool if x.dtype == bool else jnp.float32) for x in arrays]
    want = _greedy.greedy_scores(*arrays)
    naive_scores = np.stack([naive(*block) for block in zip(inverse, w, alive, strict=True)])
    np.testing.assert_allclose(want, naive_scores, rtol=2e-3)
    monkeypatch.setattr(_greedy, "_ENTRIES", 2 * side**2)  # two blocks at a time
    order = rng.permutation(blocks)
    got = _greedy.greedy_scores(*(x[order] for x in arrays))
    np.testing.assert_allclose(got, np.asarray(want)[order], rtol=1e-5)


def test_a_score_that_is_not_finite_is_not_hidden():
    inverse = jnp.stack([jnp.eye(4), jnp.eye(4).at[1, 1].set(jnp.nan)])
    ones = jnp.ones((2, 4))
    scores = np.asarray(_greedy.greedy_scores(inverse, ones, ones > 0, ones))
    assert np.isfinite(scores[0]).all()
    assert np.isnan(scores[1]).any()


def test_a_block_is_done_in_the_order_of_its_scores_even_if_costs_fall():
    # The third removal is nearly free once the first two are made.
    fisher = np.array([[1.0, 0.9, 0.9], [0.9, 1.0, 0.9], [0.9, 0.9, 1.0]])
    w = np.array([[1.0, -1.0, 0.01]])
    scores = _greedy.greedy_scores(
        jnp.asarray(np.linalg.inv(fisher)[None], jnp.float32),
        jnp.asarray(w, jnp.float32),
        jnp.ones((1, 3), bool),
        jnp.ones((1, 3)),
    )
    # Costs in the order of removal, on dense matrices.
    left, costs, order = w[0].copy(), [], []
    inverse = np.linalg.inv(fisher)
    for _ in range(3):
        cost = [left[q] ** 2 / inverse[q, q] if q not in order else np.inf for q in range(3)]
        order.append(int(np.argmin(cost)))
        costs.append(min(cost))
        left = left - inverse[:, order[-1]] * left[order[-1]] / inverse[order[-1], order[-1]]
        pivot = inverse[order[-1], order[-1]]
        inverse = inverse - np.outer(inverse[:, order[-1]], inverse[order[-1]]) / pivot
        inverse[order[-1], order[-1]] = 1.0
    assert costs[2] < costs[1]
    assert np.argsort(np.asarray(scores)[0]).tolist() == order


@pytest.mark.parametrize("packing", ["flat", "leaf"])
@pytest.mark.parametrize("blocks", [8, [5, 8, 8, 3]])
def test_a_step_cuts_all_records_at_one_level(packing, blocks):
    rng = np.random.default_rng(0)
    outputs_first = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    params = {"w": outputs_first.T}
    g = oracles.gradients("correlated", 10, 24)
    damping = 0.1
    gradients = {"w": jnp.asarray(g.reshape(10, 6, 4).swapaxes(1, 2))}
    new, mask, info = pruning.prune_step(
        params,
        pruning.initial_mask(params),
        rows.as_rows(gradients, params, storage=rows.Dense(packing=packing)),
        0.5,
        damping=damping,
        score="greedy",
        blocks=blocks,
    )
    sizes = [8, 8, 8] if blocks == 8 else blocks
    inverse = oracles.block_inverse(g, damping, sizes)
    w, alive, scores, start = (
        np.asarray(outputs_first).ravel().astype(float),
        np.ones(24, bool),
        [],
        0,
    )
    for size in sizes:
        part = slice(start, start + size)
        scores.append(naive(inverse[part, part], w[part], alive[part]))
        start += size
    kept = np.ones(24, bool)
    kept[np.argsort(np.concatenate(scores), kind="stable")[:12]] = False
    np.testing.assert_array_equal(np.asarray(mask["w"]).T.ravel(), kept)
    fisher = np.linalg.inv(inverse)
    moved = np.linalg.solve(fisher[np.ix_(kept, kept)], fisher[np.ix_(kept, ~kept)] @ w[~kept])
    np.testing.assert_allclose(
        np.asarray(new["w"]).T.ravel()[kept], (w[kept] + moved), rtol=1e-3, atol=1e-4
    )
    assert bool(info.accepted)


def test_greedy_masks_cost_less_than_those_of_single_saliencies():
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)}
    g = rows.as_rows(
        {"w": jnp.asarray(oracles.gradients("correlated", 64, 256).reshape(64, 16, 16))}, params
    )
    costs = {}
    for score in ("greedy", "mfac", "magnitude"):
        _, _, info = pruning.prune_step(
            params, pruning.initial_mask(params), g, 0.7, damping=0.01, blocks=32, score=score
        )
        costs[score] = float(info.predicted_loss_increase)
    assert costs["greedy"] < costs["mfac"] < costs["magnitude"]


@pytest.mark.parametrize("blocks", [None, "leaf"])
def test_greedy_in_blocks_that_are_too_large(blocks):
    params = {"w": jnp.zeros((64, 64))}
    with pytest.raises(ValueError, match=r"blocks of at most 2048 weights.*blocks=128"):
        pruning.prune_step(
            params,
            pruning.initial_mask(params),
            rows.as_rows({"w": jnp.ones((2, 64, 64))}, params),
            0.5,
            damping=0.1,
            score="greedy",
            blocks=blocks,
        )
