"""Budgets and schedules: exact counts, whatever the shapes."""

import first_call
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_jax import pruning, rows
from mfac_jax.pruning import Scope, _budgets, _masks, _targets
from mfac_jax.pruning._scope import select


def problem(shapes, n=3, seed=0):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    gradients = [jnp.asarray(rng.normal(size=(n, *s)), jnp.float32) for s in shapes]
    return params, rows.as_rows(gradients, params)


def step(params, g, sparsity, **options):
    return pruning.prune_step(
        params,
        pruning.initial_mask(params),
        g,
        sparsity,
        damping=0.1,
        score="magnitude",
        update="none",
        scope=Scope(path_filter="", **options),
    )


def counts_of(sparsity, budget, shapes):
    """What a budget gives to leaves of these shapes."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    selection = select(Scope(path_filter=""), params)
    return _targets.layer_counts(sparsity, _budgets.as_budget(budget), selection)


def pruned(mask):
    return [int(jnp.sum(~leaf)) for leaf in jax.tree.leaves(mask)]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(["uniform", "erk"]),
)
def test_counts_of_leaves_add_up_and_fit(shapes, sparsity, budget):
    sizes = np.prod(shapes, axis=1)
    counts = counts_of(sparsity, budget, shapes)
    assert counts.sum() == round(sparsity * sizes.sum())
    assert np.all(counts >= 0)
    assert np.all(counts <= sizes)


def test_erk_densities_follow_the_kernel_and_none_exceeds_one():
    shapes = [(3, 3, 16, 16), (3, 3, 32, 64), (64, 10), (4, 4)]
    density = 1 - counts_of(0.9, "erk", shapes) / np.asarray([np.prod(s) for s in shapes])
    kernel = np.asarray([sum(s) / np.prod(s) for s in shapes])
    assert density[3] == 1.0  # the small one is not touched
    free = density[:3] < 1
    ratio = (density[:3] / kernel[:3])[free]
    np.testing.assert_allclose(ratio, ratio[0], rtol=0.02)


@pytest.mark.parametrize("budget", ["uniform", "erk"])
def test_a_budget_holds_in_every_leaf_with_ties(budget):
    params = [jnp.ones((8, 8)), jnp.ones((3, 5)), jnp.ones((4, 16))]
    g = rows.as_rows([jnp.ones((2, *p.shape)) for p in params], params)
    _, mask, info = step(params, g, 0.5, budget=budget)
    want = counts_of(0.5, budget, [p.shape for p in params])
    assert pruned(mask) == want.tolist()
    assert int(info.num_pruned) == round(0.5 * 143)


def test_sparsity_a_leaf_as_given():
    params, g = problem([(8, 8), (3, 5), (4, 16)])
    _, mask, _ = step(params, g, [0.25, 0.0, 0.75])
    assert pruned(mask) == [16, 0, 48]


def test_costs_are_what_is_saved():
    params, g = problem([(10, 10), (10, 10)])
    _, mask, _ = step(params, g, 0.5, costs=[9, 1])
    first, second = pruned(mask)
    assert 500 - 9 < 9 * first + second <= 500
    values = [np.sort(np.abs(np.ravel(p))) for p in params]
    # The last that went ranks below the first that stays, by score over cost.
    assert values[0][first - 1] / 9 <= values[1][second] * (1 + 1e-6)
    assert values[1][second - 1] <= values[0][first] / 9 * (1 + 1e-6)


def test_the_best_weight_of_every_layer_stays_unless_asked_otherwise():
    params = [jnp.full((4, 4), 1e-3), jnp.ones((4, 4))]
    g = rows.as_rows([jnp.ones((2, 4, 4))] * 2, params)
    _, mask, _ = step(params, g, 0.5)
    assert pruned(mask) == [15, 1]
    _, mask, _ = step(params, g, 0.5, allow_empty_layers=True)
    assert pruned(mask) == [16, 0]
    _, mask, _ = step(params, g, 1.0, allow_empty_layers=True)
    assert pruned(mask) == [16, 16]


def test_a_new_sparsity_budget_count_or_schedule_compiles_nothing_anew():
    params, g = problem([(8, 8), (3, 5)])
    step(params, g, 0.3, budget="uniform")
    with first_call.measured(figures := {}):
        for sparsity in pruning.sparsity_schedule(0.8, 4, kind="cubic"):
            step(params, g, sparsity, budget="erk")
            step(params, g, [sparsity, 0.1])
    assert figures["programs"] == 0


def first_layers_first(sparsity, shapes):
    """A budget of the caller's own: what can go of the first layer goes, then of the second."""
    left, found = sparsity * sum(map(np.prod, shapes)), []
    for size in map(np.prod, shapes):
        found.append(min(left / size, 1.0))
        left -= found[-1] * size
    return found


def test_a_budget_of_the_caller_s_own():
    params, g = problem([(8, 8), (3, 5), (4, 16)])
    _, mask, _ = step(params, g, 70 / 143, budget=first_layers_first, allow_empty_layers=True)
    assert pruned(mask) == [64, 6, 0]


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        (lambda sparsity, shapes: [sparsity], ValueError, "a number for each of 2 layers, got 1"),
        (lambda sparsity, shapes: [1.5, 0.0], ValueError, r"params\[0\] must lie in .*got 1.5"),
        (lambda sparsity, shapes: [0.0, 0.0], ValueError, r"expected 40 pruned .*got 0\.0"),
        (lambda sparsity, shapes: ["all", 0.0], TypeError, r"params\[0\] must be a number.*str"),
        (lambda sparsity, shapes: None, TypeError, "a sequence of .* each of 2 layers, got None"),
        (lambda sparsity, shapes: sparsity, TypeError, r"a sequence of numbers.*, got 0\.5"),
        (lambda sparsity, shapes: {0: 0.5, 1: 0.5}, TypeError, r"a sequence of .* got \{0: 0\.5"),
        (lambda sparsity, shapes: np.ones((2, 1)), TypeError, r"a sequence of .* got array\(\[\["),
    ],
)
def test_a_budget_that_gives_something_else(budget, error, words):
    params, g = problem([(8, 8), (4, 4)])
    with pytest.raises(error, match=words):
        step(params, g, 0.5, budget=budget)


@pytest.mark.wrong_types
def test_a_budget_of_another_kind():
    params, g = problem([(8, 8), (4, 4)])
    with pytest.raises(TypeError, match=r"budget must be one of 'global', .* or a function, got 3"):
        step(params, g, 0.5, budget=3)


def test_a_budget_of_layers_needs_a_known_sparsity():
    params, g = problem([(8, 8), (4, 4)])
    with pytest.raises(TypeError, match="sparsity must be known outside jit for budget='erk'"):
        jax.jit(lambda sparsity: step(params, g, sparsity, budget="erk")[1])(0.5)


def test_below_what_is_pruned_in_a_leaf():
    params, g = problem([(8, 8), (4, 4)])
    mask = [jnp.ones((8, 8), bool), jnp.zeros((4, 4), bool).at[0].set(True)]
    with pytest.raises(ValueError, match=r"at least 12 of 16 weights of params\[1\]"):
        pruning.prune_step(params, mask, g, [0.5, 0.5], damping=0.1, scope=Scope(path_filter=""))


def test_a_leaf_that_is_ahead_of_its_budget_waits_for_the_others():
    params, _ = problem([(8, 8), (4, 4)])
    mask = [jnp.ones((8, 8), bool), jnp.ones((4, 4), bool).at[1:, 0].set(False)]

    def loss(params, batch):
        return sum(jnp.sum((w * batch.sum()) ** 2) for w in params)

    batches = [jnp.ones(2) * (i + 1) for i in range(4)]
    pruned = pruning.prune(
        params,
        loss,
        batches,
        0.6,
        steps=4,
        scope=Scope(budget="erk", path_filter=""),
        gradients=pruning.Gradients(4),
        search=pruning.Search(
            [pruning.Setting("magnitude", "none", None, 1e-3)], num_calibration=1
        ),
        mask=mask,
    )
    want = counts_of(0.6, "erk", [p.shape for p in params]).tolist()
    assert want[1] >= 3
    assert [layer.num_pruned for layer in pruned.report.layers] == want


@pytest.mark.parametrize("counts", [0, 7, 20, 41])
def test_selection_by_cost_against_sorting(counts):
    rng = np.random.default_rng(counts)
    scores = [jnp.asarray(rng.integers(0, 5, size=7), jnp.float32) for _ in range(3)]
    alive = [jnp.asarray(rng.random(7) > 0.2) for _ in scores]
    costs = (1, 2, 3)
    kept = _masks._mask_to_count(scores, alive, jnp.int32(counts), costs=costs)
    gone = sum(c * int(jnp.sum(~k)) for c, k in zip(costs, kept, strict=True))
    already = sum(c * int(jnp.sum(~a)) for c, a in zip(costs, alive, strict=True))
    assert already <= gone <= max(counts, already)
    out = max(
        (
            float(s[i])
            for s, k, a in zip(scores, kept, alive, strict=True)
            for i in np.flatnonzero(np.asarray(a & ~k))
        ),
        default=-1.0,
    )
    stay = [
        (float(s[i]), c)
        for s, k, c in zip(scores, kept, costs, strict=True)
        for i in np.flatnonzero(np.asarray(k))
    ]
    assert all(value >= out for value, _ in stay)
    # Nothing below the level of the cut stays, and what stays at it did not fit.
    level = min((value for value, _ in stay), default=0.0)
    assert all(c > counts - gone for value, c in stay if value == level and counts > already)


def test_schedules_end_exactly_and_rise():
    for kind in ("geometric", "cubic", "linear"):
        values = pruning.sparsity_schedule(0.9, 7, kind=kind, initial=0.2)
        assert values[-1] == 0.9
        assert np.all(np.diff([0.2, *values]) > 0)
    kept = 1 - np.asarray([0.2, *pruning.sparsity_schedule(0.9, 7, initial=0.2)])
    np.testing.assert_allclose(kept[1:] / kept[:-1], (0.1 / 0.8) ** (1 / 7))
    assert pruning.sparsity_schedule(0.0, 2) == (0.0, 0.0)
    assert pruning.sparsity_schedule(1.0, 2, kind="linear") == (0.5, 1.0)
    assert pruning.sparsity_schedule(1.0, 1) == (1.0,)


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ((0.9, 0), {}, "steps must be at least 1"),
        ((1.1, 2), {}, "final must lie in"),
        ((0.5, 2), {"initial": 0.6}, "final must be at least initial=0.6"),
        ((0.5, 2), {"kind": "quadratic"}, "'geometric', 'cubic', 'linear'"),
        ((1.0, 2), {}, "expected 'cubic' or 'linear' for a sparsity of 1"),
    ],
)
def test_schedules_that_are_none(args, options, words):
    with pytest.raises(ValueError, match=words):
        pruning.sparsity_schedule(*args, **options)


def test_a_budget_of_your_own_spends_what_it_is_given():
    """No more and no less, whichever way its numbers round."""
    params = [jnp.ones((10, 1)) + i for i in range(4)]
    gradients = rows.as_rows([jnp.ones((2, 10, 1))] * 4)

    def pruned(fractions):
        scope = Scope(path_filter="", budget=lambda sparsity, shapes: fractions)
        mask = pruning.initial_mask(params)
        _, mask, _ = pruning.prune_step(
            params, mask, gradients, 0.5, damping=0.1, score="magnitude", update="none", scope=scope
        )
        return [int(jnp.sum(~leaf)) for leaf in mask]

    assert pruned([0.54, 0.5, 0.5, 0.5]) == [5, 5, 5, 5]
    assert pruned([0.46, 0.5, 0.5, 0.5]) == [5, 5, 5, 5]
    assert pruned([0.9, 0.4, 0.4, 0.3]) == [9, 4, 4, 3]
    with pytest.raises(ValueError, match=r"expected 20 pruned weights in all layers, got 21\.0"):
        pruned([0.6, 0.5, 0.5, 0.5])
