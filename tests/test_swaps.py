"""What is measured of swaps is the exact loss of the quadratic model."""

import itertools

import numpy as np
import oracles
import pytest
import swaps

pytestmark = pytest.mark.once


@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_swaps_lower_the_exact_loss(kind):
    g = oracles.gradients(kind, 20, 8)
    w = np.random.default_rng(1).normal(size=8)
    block = swaps.Block(g, w, 0.05)
    fisher = g.T.astype(float) @ g / 20 + 0.05 * np.eye(8)

    def least(alive):
        gone = np.flatnonzero(~alive)
        inverse = np.linalg.inv(fisher)[np.ix_(gone, gone)]
        return w[gone] @ np.linalg.solve(inverse, w[gone]) / 2

    choices = [np.isin(np.arange(8), kept) for kept in itertools.combinations(range(8), 4)]
    losses = [least(alive) for alive in choices]
    worst = choices[int(np.argmax(losses))]
    alive, values, before, after, count = block.swap(worst)
    assert count > 0
    assert alive.sum() == 4
    assert not values[~alive].any()
    np.testing.assert_allclose(before, max(losses), rtol=1e-6)
    np.testing.assert_allclose(after, least(alive), rtol=1e-6)
    assert min(losses) * (1 - 1e-9) <= after < before
    # From the best mask there is nothing to gain.
    best = choices[int(np.argmin(losses))]
    assert block.swap(best)[4] == 0
