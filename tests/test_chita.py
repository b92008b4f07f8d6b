"""CHITA against brute force, dense solves and its own invariants, in small."""

import itertools

import chita
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import collect_gradients


def _problem(seed, n, d):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, d)) * np.exp(rng.standard_normal(d) / 2)
    return rng.standard_normal(d).astype(np.float32), rows.astype(np.float32)


def _objective(w, w0, rows, ridge, batch):
    move, rows = w.astype(np.float64) - w0, rows.astype(np.float64)
    r = rows @ move
    return r @ r / (2 * len(r)) + rows.mean(0) @ move / batch + ridge / 2 * move @ move


def _minimiser(support, w0, rows, ridge, batch):
    """The minimiser by the dense k x k system."""
    w0, rows = w0.astype(np.float64), rows.astype(np.float64)
    fisher = rows.T @ rows / len(rows) + ridge * np.eye(w0.size)
    others = np.setdiff1d(np.arange(w0.size), support)
    slope = rows.mean(0)[support] / batch - fisher[np.ix_(support, others)] @ w0[others]
    w = np.zeros(w0.size)
    w[support] = w0[support] - np.linalg.solve(fisher[np.ix_(support, support)], slope)
    return w


def _ridge(damping, rows):
    return damping * float(np.mean(rows.astype(np.float64) ** 2))


def _stage(w, rows, k, config, batch=16, alive=None):
    alive = np.ones(w.shape, bool) if alive is None else alive
    return chita.stage(w, alive, rows, k, config, batch)


def test_masks_are_near_the_best_of_all():
    k, d, batch, config = 4, 9, 16, chita.Chita(1.0)
    excess, of_magnitude = [], []
    for seed in range(24):
        w, rows = _problem(seed, 6, d)
        ridge = _ridge(1.0, rows)

        def least(support, problem=(w, rows, ridge, batch)):
            return _objective(_minimiser(np.array(support), *problem), *problem)

        best = min(least(support) for support in itertools.combinations(range(d), k))
        found, alive, _ = _stage(w, rows, k, config, batch)
        value = _objective(found, w, rows, ridge, batch)
        assert value >= best * (1 - 1e-5)
        assert value == pytest.approx(least(np.flatnonzero(alive)), rel=1e-5)
        excess.append(value / best - 1)
        of_magnitude.append(least(np.argsort(-np.abs(w))[:k]) / best - 1)
    assert np.mean(np.array(excess) < 0.05) >= 0.7
    assert np.mean(excess) < np.mean(of_magnitude) / 2


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 5, 2), (6, 40, 10), (40, 12, 6), (7, 20, 20)])
def test_back_solve(n, d, k, first_order, monkeypatch):
    monkeypatch.setattr(chita, "_PART", 7)
    w, rows = _problem(n, n, d)
    found, alive, values = _stage(w, rows, k, chita.Chita(1e-4, first_order=first_order), 8)
    ridge, batch = _ridge(1e-4, rows), 8 if first_order else np.inf
    expected = _minimiser(np.flatnonzero(alive), w, rows, ridge, batch)
    objective = _objective(expected, w, rows, ridge, batch)
    assert values[-1] == pytest.approx(objective, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("block", [None, 7, 50])
def test_invariants(block):
    w, rows = _problem(3, 8, 50)
    alive = np.arange(50) % 5 != 0
    w[~alive] = 0
    found, still, values = _stage(w, rows, 13, chita.Chita(0.01, block, 20), alive=alive)
    assert still.sum() == 13
    assert not np.any(still & ~alive)
    assert np.all(found[~still] == 0)
    assert np.all(np.diff(values[:-1]) <= 0)
    assert values[-1] < 0.9 * values[0]
    assert 3 <= len(values) <= 22
    # The same start, without an iteration.
    _, of_magnitude, (start, end) = _stage(w, rows, 13, chita.Chita(0.01, block, 0), alive=alive)
    assert start == pytest.approx(values[0], rel=1e-6)
    assert values[-1] < end
    assert np.abs(w[of_magnitude]).min() >= np.abs(w[~of_magnitude]).max()


@pytest.mark.parametrize("block", [None, 6])
def test_iterations_reach_the_minimum(block):
    w, rows = _problem(7, 8, 20)
    _, alive, values = _stage(w, rows, 19, chita.Chita(1.0, block), 1)
    # Both are float32.
    assert abs(values[-2] - values[-1]) < 1e-3 * (values[0] - values[-1])
    if block is None:
        ridge = _ridge(1.0, rows)
        best = _minimiser(np.flatnonzero(alive), w, rows, ridge, 1)
        assert values[-1] == pytest.approx(_objective(best, w, rows, ridge, 1), rel=1e-4)


def test_block_form():
    w, rows = _problem(4, 6, 30)
    whole = _stage(w, rows, 10, chita.Chita(0.1))
    np.testing.assert_array_equal(_stage(w, rows, 10, chita.Chita(0.1, 30))[0], whole[0])
    np.testing.assert_array_equal(_stage(w, rows, 10, chita.Chita(0.1, 64))[0], whole[0])

    # A row for each block, with zeros elsewhere, makes the whole Fisher block-diagonal.
    apart = np.zeros((3, 6, 3, 10), np.float32)
    for i in range(3):
        apart[i, :, i] = np.sqrt(3) * rows[:, 10 * i : 10 * (i + 1)]
    apart = apart.reshape(18, 30)
    # The mean of the rows is that of ``rows`` over sqrt(3).
    expected, alive, _ = _stage(w, apart, 10, chita.Chita(0.1), 16)
    found, same, _ = _stage(w, rows, 10, chita.Chita(0.1, 10), 16 * np.sqrt(3))
    np.testing.assert_array_equal(same, alive)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, whole[0], atol=1e-3)


def test_blocks_go_output_by_output():
    assert chita._by_output([(2, 3), (2,), ()]).tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8]
    w, rows = _problem(3, 12, 12)
    order = np.random.default_rng(1).permutation(12)
    alive = np.arange(12) % 5 > 0
    w = np.where(alive, w, 0)
    config = chita.Chita(0.5, block=3)
    found, kept, values = chita.stage(w, alive, rows, 5, config, 16, order)
    want, mask, objectives = chita.stage(w[order], alive[order], rows[:, order], 5, config, 16)
    np.testing.assert_array_equal(found[order], want)
    np.testing.assert_array_equal(kept[order], mask)
    assert values == objectives


def test_first_order_term():
    w, rows = _problem(5, 6, 24)
    centred = rows - rows.mean(0)
    # Up to rounding of the mean.
    found, alive, _ = _stage(w, centred, 8, chita.Chita(0.1), 1)
    expected, same, _ = _stage(w, centred, 8, chita.Chita(0.1), 10**9)
    np.testing.assert_array_equal(alive, same)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    first, second = (_stage(w, rows, 8, chita.Chita(0.1), batch)[0] for batch in (1, 10**9))
    assert not np.allclose(first, second, atol=1e-2)


def test_equal_weights_are_counted_exactly():
    _, rows = _problem(6, 5, 16)
    w = np.ones(16, np.float32)
    w[10:] = 0
    for k in (4, 10, 13, 16):
        found, alive, values = _stage(w, rows, k, chita.Chita(0.1))
        assert alive.sum() == k
        assert np.all(np.isfinite(found))
        assert np.all(np.isfinite(values))
        # Without IHT no weight is above the level, and the others are added.
        _, alive, _ = _stage(w, rows, k, chita.Chita(0.1, iterations=0))
        assert alive.sum() == k
        assert alive[:10].sum() == min(k, 10)


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_largest(k):
    w = jnp.array([[0.5, -3.0, 0.0, 2.0], [1e-30, -2.0, 7.0, 0.25]])
    kept = np.asarray(chita._largest(w, jnp.int32(k)))
    # Two weights are equal, so 3 and 4 are 2 and 4.
    expected = {1: 1, 3: 2, 4: 4, 7: 7}[k]
    order = np.argsort(-np.abs(np.asarray(w)).ravel())[:expected]
    assert set(np.flatnonzero(kept)) == set(order)


@pytest.mark.parametrize(
    ("k", "damping", "width", "message"),
    [
        (0, 0.1, 6, "between 1 and the 6 weights that are alive, got 0"),
        (7, 0.1, 6, "got 7"),
        (2, 0.0, 6, "damping must be positive, got 0"),
        (2, 0.1, 5, r"rows \(n, d\), got \(6,\)"),
    ],
)
def test_errors(k, damping, width, message):
    with pytest.raises(ValueError, match=message):
        _stage(np.ones(6, np.float32), np.ones((2, width), np.float32), k, chita.Chita(damping))


def _loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"]["w"] + params["a"]["bias"][None])
    return jnp.mean((jnp.sum(hidden @ params["v"], axis=1) - y) ** 2)


def _network():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5)).astype(np.float32)
    params = {
        "a": {"bias": jnp.ones(6), "w": jnp.asarray(rng.standard_normal((5, 6)), jnp.float32)},
        "v": jnp.asarray(rng.standard_normal((6, 2)), jnp.float32),
    }
    batches = [(x[i : i + 4], np.sin(x[i : i + 4, 0])) for i in range(0, 64, 4)]
    return params, batches


def test_prune():
    params, batches = _network()
    options = {"count": 16, "batch": 4, "config": chita.Chita(0.1), "is_pruned": _is_pruned}
    pruned, mask, seconds = chita.prune(params, _loss, batches, [0.3, 0.5], **options)
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert jax.tree.structure(pruned) == jax.tree.structure(params) == jax.tree.structure(mask)
    alive = [mask["a"]["w"], mask["v"]]
    assert sum(int(x.sum()) for x in alive) == 21
    assert bool(mask["a"]["bias"].all())
    np.testing.assert_array_equal(pruned["a"]["bias"], params["a"]["bias"])
    for weights, kept in zip([pruned["a"]["w"], pruned["v"]], alive, strict=True):
        np.testing.assert_array_equal(weights != 0, kept)

    # Two calls are two stages.
    first, _, _ = chita.prune(params, _loss, batches, [0.3], **options)
    assert not np.allclose(first["v"], pruned["v"])
    # Given gradients are those that it takes itself.
    given = collect_gradients(_loss, params, batches, 16, progress=False)
    same, _, _ = chita.prune(params, _loss, [], [0.3], given=given, **options)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def _is_pruned(path, leaf):
    return path in ("a/w", "v")


def test_an_iterator_goes_on_from_stage_to_stage():
    params, batches = _network()
    read = iter(batches)
    options = {"count": 4, "batch": 4, "config": chita.Chita(0.1), "is_pruned": _is_pruned}
    chita.prune(params, _loss, read, [0.2, 0.4, 0.5], **options)
    assert next(read) is batches[12]


def test_prune_names_what_is_wrong():
    params, batches = _network()
    options = {"count": 4, "batch": 4, "config": chita.Chita(0.1)}
    with pytest.raises(ValueError, match=r"rise within \[0, 1\), got \[0.5, 0.3\]"):
        chita.prune(params, _loss, batches, [0.5, 0.3], is_pruned=_is_pruned, **options)
    with pytest.raises(ValueError, match="at least one leaf, got none"):
        chita.prune(params, _loss, batches, [0.5], is_pruned=lambda *_: False, **options)
