"""One step, and steps through a schedule."""

import functools

import first_call
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax import pruning, rows

SHAPES = {"fc1": {"bias": (6,), "kernel": (4, 6)}, "fc2": {"bias": (3,), "kernel": (6, 3)}}
TOTAL = 42


def is_shape(x):
    return isinstance(x, tuple)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = jax.tree.map(draw, SHAPES, is_leaf=is_shape)
    gradients = jax.tree.map(lambda s: draw((8, *s)), SHAPES, is_leaf=is_shape)
    return params, gradients


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def kernels(tree):
    """Output by output, as blocks are cut."""
    return np.concatenate([np.ravel(np.transpose(tree[k]["kernel"])) for k in ("fc1", "fc2")])


def oracle(params, gradients, alive, count, damping, size):
    """The joint step on the kernels alone, in float64, blocks of ``size`` alive weights."""
    w = kernels(params).astype(np.float64)
    matrix = np.stack([kernels(jax.tree.map(lambda g, i=i: g[i], gradients)) for i in range(8)])
    g = matrix.astype(np.float64) * alive
    block = np.empty(TOTAL, int)
    block[np.argsort(~alive, kind="stable")] = np.arange(TOTAL) // size
    fisher = damping * np.eye(TOTAL) + g.T @ g / 8 * (block[:, None] == block[None, :])
    scores = np.where(alive, w**2 / (2 * np.diag(np.linalg.inv(fisher))), -1)
    kept = np.ones(TOTAL, bool)
    kept[np.argsort(scores, kind="stable")[:count]] = False
    gone = alive & ~kept
    delta = np.where(gone, -w, 0)
    rhs = fisher[np.ix_(kept, gone)] @ w[gone]
    delta[kept] = np.linalg.solve(fisher[np.ix_(kept, kept)], rhs)
    return (w + delta) * kept, kept, fisher, delta


@pytest.mark.parametrize(
    ("blocks", "packing"), [(None, "flat"), (None, "leaf"), (10, "flat"), (5, "leaf")]
)
def test_two_steps_agree_with_dense_algebra(problem, blocks, packing):
    params, gradients = problem
    mask = pruning.initial_mask(params)
    g = rows.as_rows(gradients, params, storage=rows.Dense(packing=packing))
    alive, biases = np.ones(TOTAL, bool), params["fc1"]["bias"]
    for sparsity in (0.35, 0.6):
        count = round(sparsity * TOTAL)
        w, kept, fisher, delta = oracle(params, gradients, alive, count, 0.2, blocks or TOTAL)
        params, mask, info = pruning.prune_step(
            params, mask, g, sparsity, damping=0.2, blocks=blocks
        )
        np.testing.assert_array_equal(kernels(mask), kept)
        np.testing.assert_allclose(kernels(params), w, rtol=1e-4, atol=1e-5)
        assert np.all(kernels(params)[~kept] == 0)
        assert (int(info.num_pruned), int(info.num_alive)) == (count, TOTAL - count)
        rise = delta @ fisher @ delta / 2
        np.testing.assert_allclose(info.predicted_loss_increase, rise, rtol=1e-4)
        undamped = rise - 0.2 * delta @ delta / 2
        np.testing.assert_allclose(info.undamped_loss_increase, undamped, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(info.update_norm, np.linalg.norm(delta[kept]), rtol=1e-4)
        np.testing.assert_allclose(info.removed_norm, np.linalg.norm(delta[~kept]), rtol=1e-4)
        assert info.accepted
        alive = kept
    # What may not be pruned did not move, and is alive in the mask.
    np.testing.assert_array_equal(params["fc1"]["bias"], biases)
    assert np.all(mask["fc1"]["bias"])
    assert np.all(mask["fc2"]["bias"])


def test_a_schedule_compiles_once(problem):
    params, gradients = problem
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)
    scope = pruning.Scope(allow_empty_layers=True)
    for i, sparsity in enumerate((0.1, jnp.asarray(0.2), np.float64(0.3), 0.5, 0.7, 1)):
        damping = 0.1 / (i + 1) if i % 2 else jnp.asarray(0.1)
        with first_call.measured(figures := {}):
            params, mask, info = pruning.prune_step(
                params, mask, g, sparsity, damping=damping, blocks=7, scope=scope
            )
        assert int(info.num_pruned) == round(float(sparsity) * TOTAL)
        assert i < 2 or figures["programs"] == 0  # by now a number and an array have come
    assert not np.any(kernels(params))


def test_sparsity_may_be_traced(problem):
    params, gradients = problem
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)
    step = jax.jit(lambda p, m, s: pruning.prune_step(p, m, g, s, damping=0.1))
    for sparsity in (0.3, 0.55):
        traced = step(params, mask, jnp.asarray(sparsity))
        known = pruning.prune_step(params, mask, g, sparsity, damping=0.1)
        assert int(traced[2].num_pruned) == round(sparsity * TOTAL)
        np.testing.assert_array_equal(flat(traced[1]), flat(known[1]))
        np.testing.assert_allclose(flat(traced[0]), flat(known[0]), rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1


def test_no_layer_vanishes_whatever_the_sparsity_is_given_as(problem):
    params, gradients = problem
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)
    for sparsity in (1.0, np.float32(1.0), jnp.asarray(1.0)):
        with pytest.raises(ValueError, match="without weights"):
            pruning.prune_step(params, mask, g, sparsity, damping=0.1)
    step = jax.jit(lambda s: pruning.prune_step(params, mask, g, s, damping=0.1))
    _, new_mask, info = step(jnp.asarray(1.0))
    assert info.accepted
    assert [int(np.sum(new_mask[k]["kernel"])) for k in ("fc1", "fc2")] == [1, 1]


def test_scores_and_updates_to_choose_from(problem):
    params, gradients = problem
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)

    def step(**options):
        return pruning.prune_step(params, mask, g, 0.5, damping=1e-3, **options)

    kept, kept_mask, info = step(score="magnitude", update="none")
    order = np.argsort(np.abs(kernels(params)), kind="stable")
    assert set(np.flatnonzero(~kernels(kept_mask))) == set(order[: TOTAL // 2])
    np.testing.assert_array_equal(flat(kept), flat(params) * flat(kept_mask))
    assert float(info.update_norm) == 0
    rises = [
        float(step(update=update)[2].predicted_loss_increase)
        for update in ("joint", "reference", "none")
    ]
    assert rises[0] < rises[1] < rises[2]


def test_zero_biases_and_zero_weights_are_alive(problem):
    params, gradients = problem
    params["fc1"]["bias"] = jnp.zeros(6)
    params["fc1"]["kernel"] = params["fc1"]["kernel"].at[0].set(0.0)
    mask = pruning.initial_mask(params)
    g = rows.as_rows(gradients, params)
    new, mask, _ = pruning.prune_step(params, mask, g, 0.0, damping=0.1)
    assert np.all(flat(mask))
    np.testing.assert_array_equal(flat(new), flat(params))


def test_weights_that_are_pruned_stay_zero(problem):
    """Also where training has moved them off zero meanwhile."""
    params, gradients = problem
    g = rows.as_rows(gradients, params)
    first, mask, _ = pruning.prune_step(params, pruning.initial_mask(params), g, 0.5, damping=0.1)
    drifted = jax.tree.map(lambda w: w + 1e3, first)
    drifted = jax.tree.map(lambda d, w, m: jnp.where(m, w, d), drifted, first, mask)
    again, new_mask, info = pruning.prune_step(drifted, mask, g, 0.7, damping=0.1)
    clean = pruning.prune_step(first, mask, g, 0.7, damping=0.1)
    np.testing.assert_array_equal(flat(new_mask), flat(clean[1]))
    np.testing.assert_array_equal(flat(again), flat(clean[0]))
    assert not np.any(flat(new_mask) & ~flat(mask))
    assert int(info.num_pruned) == round(0.7 * TOTAL)


@pytest.mark.parametrize("blocks", [None, 10])
def test_what_is_not_finite_is_an_error(problem, blocks):
    params, gradients = problem
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)
    bad = jax.tree.map(lambda leaf: leaf, params)
    bad["fc1"]["kernel"] = bad["fc1"]["kernel"].at[1, 1].set(jnp.inf)
    with pytest.raises(FloatingPointError, match=r"params\['fc1'\]\['kernel'\] has NaN or Inf"):
        pruning.prune_step(bad, mask, g, 0.5, damping=0.1, blocks=blocks)
    gradients["fc1"]["kernel"] = gradients["fc1"]["kernel"].at[2, 1, 1].set(jnp.nan)
    g = rows.as_rows(gradients, params)
    with pytest.raises(
        FloatingPointError, match=r"gradient 2 of rows must be .* params\['fc1'\]\['kernel'\]"
    ):
        pruning.prune_step(params, mask, g, 0.5, damping=0.1, blocks=blocks)


def test_under_jit_a_step_that_is_not_finite_is_not_taken(problem):
    params, gradients = problem
    gradients["fc1"]["kernel"] = gradients["fc1"]["kernel"].at[2, 1, 1].set(jnp.nan)
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)
    for blocks in (None, 10):
        step = jax.jit(functools.partial(pruning.prune_step, damping=0.1, blocks=blocks))
        new, new_mask, info = step(params, mask, g, 0.5)
        assert not info.accepted
        assert int(info.num_pruned) == 0
        np.testing.assert_array_equal(flat(new), flat(params))
        np.testing.assert_array_equal(flat(new_mask), flat(mask))


@pytest.mark.x64
def test_dtypes_and_absent_leaves():
    params = {
        "u": jnp.ones((3, 3), jnp.bfloat16) * 0.5,
        "v": jnp.linspace(1.0, 2.0, 6, dtype=jnp.float64).reshape(2, 3),
        "none": None,
        "x": jnp.ones((2, 2), jnp.float16) * 4,
    }
    gradients = jax.tree.map(lambda p: jnp.ones((2, *p.shape), jnp.float32), params)
    g = rows.as_rows(gradients, params)
    new, mask, info = pruning.prune_step(
        params,
        pruning.initial_mask(params),
        g,
        9 / 19,
        damping=1e3,
        blocks="leaf",
        scope=pruning.Scope(allow_empty_layers=True),
    )
    assert jax.tree.map(lambda p: p.dtype, new) == jax.tree.map(lambda p: p.dtype, params)
    assert [bool(np.all(mask[k])) for k in "uvx"] == [False, True, True]
    assert not np.any(mask["u"])
    # A leaf in which nothing is pruned keeps every digit.
    np.testing.assert_array_equal(new["v"], params["v"])
    assert new["none"] is mask["none"] is None
    assert int(info.num_pruned) == 9


def test_the_caller_s_arrays_are_left_alone(problem):
    params, gradients = problem
    inputs = params, pruning.initial_mask(params), rows.as_rows(gradients, params)
    before = [np.array(leaf) for leaf in jax.tree.leaves(inputs)]
    pruning.prune_step(*inputs, 0.5, damping=0.1, update="reference")
    for old, new in zip(before, jax.tree.leaves(inputs), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_flax_nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.LayerNorm(3, rngs=rngs)

    net = Net(nnx.Rngs(0))
    params = nnx.state(net, nnx.Param)
    gradients = jax.tree.map(lambda p: jnp.ones((2, *p.shape)), params)
    new, mask, _ = pruning.prune_step(
        params, pruning.initial_mask(params), rows.as_rows(gradients, params), 0.5, damping=0.1
    )
    nnx.update(net, new)
    assert int(jnp.sum(net.fc.kernel[...] == 0)) == 6
    assert int(sum(jnp.sum(~leaf) for leaf in jax.tree.leaves(mask))) == 6
    np.testing.assert_array_equal(net.norm.scale[...], 1)


def test_sharded_parameters_keep_their_sharding(problem):
    params, gradients = problem
    expected = pruning.prune_step(
        params, pruning.initial_mask(params), rows.as_rows(gradients, params), 0.5, damping=0.1
    )
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    over_kernel = NamedSharding(mesh, PartitionSpec(None, "x"))

    def place(tree, lead):
        spec = NamedSharding(mesh, PartitionSpec(*[None] * lead, None, "x"))
        whole = NamedSharding(mesh, PartitionSpec())
        kernel = lambda leaf: leaf.ndim == 2 + lead and leaf.shape[-1] % 2 == 0  # noqa: E731
        return jax.tree.map(lambda x: jax.device_put(x, spec if kernel(x) else whole), tree)

    params, gradients = place(params, 0), place(gradients, 1)
    mask = place(pruning.initial_mask(params), 0)
    new, new_mask, _ = pruning.prune_step(
        params,
        mask,
        rows.as_rows(gradients, params, storage=rows.Dense(packing="leaf")),
        0.5,
        damping=0.1,
    )
    assert new["fc1"]["kernel"].sharding.is_equivalent_to(over_kernel, 2)
    np.testing.assert_array_equal(flat(new_mask), flat(expected[1]))
    np.testing.assert_allclose(flat(new), flat(expected[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": {"fc1": jnp.ones(2)}}, ValueError, r"params does not have the structure .*got"),
        ({"mask": {"fc1": jnp.ones(2, bool)}}, ValueError, r"mask does not have the structure"),
        ({"sparsity": 1.01}, ValueError, r"sparsity must lie in \[0, 1\], got 1.01"),
        ({"sparsity": None}, TypeError, r"sparsity"),
        ({"sparsity": jnp.ones(2)}, ValueError, r"sparsity must be a scalar, .* \(2,\)"),
        ({"damping": -1.0}, ValueError, r"damping must be finite and greater than 0, got -1.0"),
        ({"score": "wanda"}, ValueError, r"score must be one of 'mfac', .*; got 'wanda'"),
        ({"update": "best"}, ValueError, r"update must be one of 'joint', .*; got 'best'"),
        # Blocks run over the prunable weights alone: 42 of the 51.
        ({"blocks": (41, 10)}, ValueError, r"blocks must cover .* d = 42, .* add up to 51"),
        ({"blocks": -3}, ValueError, r"blocks must be at least 1, got -3"),
        (
            {"scope": pruning.Scope(output_axis=2)},
            ValueError,
            r"output_axis=2 .*\['fc1'\]\['kernel'\].*\(4, 6\)",
        ),
        (
            {"scope": pruning.Scope(path_filter="conv")},
            ValueError,
            r"path_filter must select at least one",
        ),
        ({"rows": {"g": jnp.ones(3)}}, TypeError, r"rows"),
    ],
)
def test_bad_input(problem, change, error, message):
    params, gradients = problem
    inputs = {
        "params": params,
        "mask": pruning.initial_mask(params),
        "rows": rows.as_rows(gradients, params),
        "sparsity": 0.5,
        "damping": 0.1,
    }
    with pytest.raises(error, match=message):
        pruning.prune_step(**inputs | change)


def test_a_sparsity_below_what_is_pruned_already(problem):
    params, gradients = problem
    g = rows.as_rows(gradients, params)
    params, mask, _ = pruning.prune_step(params, pruning.initial_mask(params), g, 0.5, damping=0.1)
    with pytest.raises(ValueError, match=r"sparsity .* at least 21 of 42 .* \(17 weights\)"):
        pruning.prune_step(params, mask, g, 0.4, damping=0.1)
    with pytest.raises(ValueError, match="at least 21 of 42"):
        pruning.prune_step(params, mask, g, jnp.asarray(0.4), damping=0.1)
    traced = jax.jit(lambda sparsity: pruning.prune_step(params, mask, g, sparsity, damping=0.1))
    _, new_mask, info = traced(jnp.asarray(0.4))
    np.testing.assert_array_equal(flat(new_mask), flat(mask))
    assert int(info.num_pruned) == 21


@pytest.mark.parametrize("pattern", [pruning.Unstructured(), pruning.NofM(2, 4)])
@pytest.mark.parametrize("packing", ["flat", "leaf"])
def test_flax_kernels_are_pruned_as_those_of_pytorch_are(pattern, packing):
    rng = np.random.default_rng(3)
    shapes = {"conv": (3, 3, 4, 6), "dense": (8, 5)}
    orders = {"conv": (3, 2, 0, 1), "dense": (1, 0)}
    flax = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    gradients = {k: jnp.asarray(rng.normal(size=(8, *s)), jnp.float32) for k, s in shapes.items()}
    torch = {k: jnp.transpose(flax[k], orders[k]) for k in flax}
    transposed = {
        k: jnp.transpose(g, (0, *(a + 1 for a in orders[k]))) for k, g in gradients.items()
    }

    def step(params, gradients, pattern, **options):
        return pruning.prune_step(
            params,
            pruning.initial_mask(params),
            rows.as_rows(gradients, params, storage=rows.Dense(packing=packing)),
            0.4,
            damping=0.05,
            score="greedy",
            blocks=16,
            scope=pruning.Scope(pattern=pattern, **options),
        )

    in_flax, mask, info = step(flax, gradients, pattern)
    if isinstance(pattern, pruning.NofM):
        pattern = pruning.NofM(2, 4, axis=1)
    in_torch, torch_mask, torch_info = step(torch, transposed, pattern, output_axis=0)
    for k in torch_mask:
        np.testing.assert_array_equal(jnp.transpose(mask[k], orders[k]), torch_mask[k])
        np.testing.assert_allclose(
            jnp.transpose(in_flax[k], orders[k]), in_torch[k], rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(
        info.predicted_loss_increase, torch_info.predicted_loss_increase, rtol=1e-4
    )


def test_a_step_scale_that_is_not_finite_is_not_taken(problem):
    params, gradients = problem
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)
    new, new_mask, info = pruning.prune_step(
        params, mask, g, 0.5, damping=0.1, step_scale=jnp.asarray(jnp.nan)
    )
    assert not info.accepted
    np.testing.assert_array_equal(flat(new), flat(params))
    np.testing.assert_array_equal(flat(new_mask), flat(mask))
