"""Groups of weights: their scores, what goes, and what a pattern does not fit."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import pruning, rows
from mfac_jax.inverse import GroupBlocks
from mfac_jax.pruning import Groups, Pattern, Scope, _blocks, _choices, _problem, _scores
from mfac_jax.pruning._scope import select

N = 12
SHAPES = {"a": (4, 8, 3), "b": (8, 4)}


def problem(kind="independent", seed=0, shapes=SHAPES, n=N):
    rng = np.random.default_rng(seed)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    d = sum(w.size for w in params.values())
    flat = oracles.gradients(kind, n, d, seed)
    cuts = np.cumsum([w.size for w in params.values()])[:-1]
    parts = np.split(flat, cuts, axis=1)
    tree = {k: jnp.asarray(p.reshape(n, *shapes[k])) for k, p in zip(shapes, parts, strict=True)}
    return params, tree


def turned(leaf, pattern, lead=0):
    """A leaf with its groups as rows, by NumPy; ``lead`` axes come first and stay there.

    Groups are in the order of outputs (the last axis), then inputs (the one before).
    """
    x = np.asarray(leaf, np.float64)
    given = pattern.axis
    if given is None:
        given = -1 if isinstance(pattern, pruning.Slices) else -2
    axis = given % (x.ndim - lead) + lead
    if isinstance(pattern, pruning.Slices):
        moved = np.moveaxis(x, axis, lead)
        return moved.reshape(*x.shape[:lead], x.shape[axis], -1)
    size = pattern.m if isinstance(pattern, pruning.NofM) else pattern.size
    places = [*range(lead, x.ndim - 2)]
    order = [a for a in (x.ndim - 1, x.ndim - 2, *places) if a != axis]
    return x.transpose(*range(lead), *order, axis).reshape(*x.shape[:lead], -1, size)


def dense_saliencies(params, gradients, pattern, damping, block):
    """``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`` of any Q inside a group, by dense float64 algebra."""
    names = list(params)
    groups = [turned(params[k], pattern) for k in names]
    g = np.concatenate([turned(gradients[k], pattern, 1).reshape(N, -1) for k in names], axis=1)
    w = np.concatenate([x.ravel() for x in groups])
    sizes = [block] * (w.size // block) if block else [w.size]
    inverse = oracles.block_inverse(g, damping, sizes)
    starts, start = [], 0
    for x in groups:
        for _ in range(x.shape[0]):
            starts.append((start, x.shape[1]))
            start += x.shape[1]

    def saliency(group, which=None):
        at, size = starts[group]
        q = at + np.arange(size) if which is None else at + np.asarray(which)
        return w[q] @ np.linalg.solve(inverse[np.ix_(q, q)], w[q]) / 2

    return saliency, starts


def flat_mask(mask, pattern):
    return np.concatenate([turned(mask[k], pattern).ravel() for k in mask]).astype(bool)


GROUPS = [
    (pruning.BlocksOf(4), {"a": (3, 4, 2), "b": (8, 5)}, 16),
    (pruning.BlocksOf(4, axis=-1), {"a": (4, 3, 8), "b": (8, 4)}, None),
    (pruning.BlocksOf(4, axis=0), {"a": (4, 3, 2), "b": (8, 5)}, None),
    (pruning.BlocksOf(4, axis=0), {"a": (4, 3, 2), "b": (8, 5)}, 16),
    (pruning.BlocksOf(2, axis=1), SHAPES, 8),
    (pruning.Slices(), SHAPES, None),
    (pruning.Slices(axis=0), SHAPES, None),
    (pruning.Slices(axis=1), {"a": (3, 4, 2), "b": (5, 4)}, None),
]


# A pattern works on blocks of columns, whatever their packing: the other one says little more.
PACKINGS = ["flat", pytest.param("leaf", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("pattern", "shapes", "blocks"), GROUPS)
@pytest.mark.parametrize("kind", ["independent", "correlated", "duplicated"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_groups_of_least_exact_saliency_go(pattern, shapes, blocks, kind, packing):
    params, gradients = problem(kind, shapes=shapes)
    g = rows.as_rows(gradients, params, storage=rows.Dense(packing=packing))
    damping = 0.05
    new, mask, info = pruning.prune_step(
        params,
        pruning.initial_mask(params),
        g,
        0.5,
        damping=damping,
        blocks=blocks,
        scope=Scope(path_filter="", pattern=pattern),
    )
    saliency, starts = dense_saliencies(params, gradients, pattern, damping, blocks)
    costs = np.asarray([saliency(i) / size for i, (_, size) in enumerate(starts)])
    alive = flat_mask(mask, pattern)
    gone = np.asarray([not alive[at : at + size].any() for at, size in starts])
    kept = np.asarray([alive[at : at + size].all() for at, size in starts])
    assert np.all(gone | kept), "a group is torn"
    assert costs[gone].max() <= costs[kept].min() * (1 + 1e-4)
    assert int(info.num_pruned) == sum(size for (_, size), x in zip(starts, gone, strict=True) if x)
    assert int(info.num_pruned) <= alive.size / 2 < int(info.num_pruned) + starts[0][1] * 3
    pruned = [np.all(np.asarray(new[k])[~np.asarray(mask[k])] == 0) for k in new]
    assert all(pruned)
    assert bool(info.accepted)


@pytest.mark.parametrize("pattern", [pruning.Slices(), pruning.Slices(axis=0)])
def test_slices_in_leaf_blocks_score_by_the_leaf_alone(pattern):
    params, gradients = problem("correlated")
    both, _, _ = pruning.prune_step(
        params,
        pruning.initial_mask(params),
        rows.as_rows(gradients, params),
        {"a": 0.5, "b": 0.0},
        damping=0.05,
        blocks="leaf",
        scope=Scope(path_filter="", pattern=pattern),
    )
    alone, _, _ = pruning.prune_step(
        params["a"],
        jnp.ones(SHAPES["a"], bool),
        rows.as_rows(gradients["a"], params["a"]),
        0.5,
        damping=0.05,
        scope=Scope(pattern=pattern),
    )
    np.testing.assert_allclose(both["a"], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["magnitude", "obd"])
@pytest.mark.parametrize("blocks", [3, pruning.WithinOutputs(4)])
def test_slices_score_alike_whatever_the_blocks(score, blocks):
    params = [jnp.array([[0.1, 1.0], [5.0, 0.0], [5.0, 0.0]]), jnp.arange(1.0, 9.0).reshape(2, 4)]
    g = rows.as_rows([jnp.ones((3, *p.shape)) for p in params], params)

    def step(blocks):
        return pruning.prune_step(
            params,
            pruning.initial_mask(params),
            g,
            0.5,
            damping=0.1,
            score=score,
            update="none",
            blocks=blocks,
            scope=Scope(pattern=pruning.Slices()),
        )

    _, want, _ = step(None)
    _, mask, info = step(blocks)
    jax.tree.map(np.testing.assert_array_equal, mask, want)
    assert not mask[0][:, 1].any()
    assert info.accepted


# Every score and way to cut blocks at one ratio, and every ratio once; all of them are slow.
SCORES = [("mfac", None), ("mfac", 16), ("greedy", 16), ("obd", None), ("obd", 16)]
SCORES += [("magnitude", None), ("magnitude", 16)]
RATIOS = [(2, 4), (1, 4), (1, 2), (3, 4), (4, 8)]
EXACT = [
    pytest.param(
        ratio, *score, marks=[pytest.mark.slow] * (ratio != (2, 4) and score != ("mfac", 16))
    )
    for ratio in RATIOS
    for score in SCORES
]


@pytest.mark.parametrize(("n_of_m", "score", "blocks"), EXACT)
def test_n_of_m_holds_exactly_in_the_end_and_never_less(n_of_m, score, blocks):
    n, m = n_of_m
    pattern = pruning.NofM(n, m, axis=0)
    params, gradients = problem("correlated", shapes={"a": (8, 2, 3), "b": (8, 4)})
    mask, g = pruning.initial_mask(params), rows.as_rows(gradients, params)
    for part in (0.4, 0.7, 1.0):
        before = flat_mask(mask, pattern)
        params, mask, info = pruning.prune_step(
            params,
            mask,
            g,
            part * (1 - n / m),
            damping=0.05,
            blocks=blocks,
            score=score,
            scope=Scope(path_filter="", pattern=pattern),
        )
        alive = flat_mask(mask, pattern)
        assert bool(info.accepted)
        assert not np.any(alive & ~before)
        assert np.all(alive.reshape(-1, m).sum(1) >= n)
        assert (~alive).sum() == round(part * (1 - n / m) * alive.size)
    assert np.all(alive.reshape(-1, m).sum(1) == n)


@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 4), (2, 8)])
@pytest.mark.parametrize("blocks", [None, 16])
def test_n_of_m_takes_the_cheapest_choice_of_every_group(n_of_m, blocks):
    n, m = n_of_m
    pattern = pruning.NofM(n, m)
    params, gradients = problem("correlated")
    shapes_fit = {"a": params["a"], "b": params["b"]}
    _, mask, _ = pruning.prune_step(
        shapes_fit,
        pruning.initial_mask(params),
        rows.as_rows(gradients, params),
        1 - n / m,
        damping=0.05,
        blocks=blocks,
        scope=Scope(path_filter="a" if m == 8 else "", pattern=pattern),
    )
    if m == 8:
        params, gradients, mask = ({"a": t["a"]} for t in (params, gradients, mask))
    saliency, starts = dense_saliencies(params, gradients, pattern, 0.05, blocks)
    alive = flat_mask(mask, pattern)
    for group, (at, size) in enumerate(starts):
        chosen = saliency(group, np.flatnonzero(~alive[at : at + size]))
        least = min(saliency(group, q) for q in itertools.combinations(range(m), m - n))
        assert chosen <= least * (1 + 1e-4)


def test_a_choice_contains_what_is_pruned_already():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    alive = jnp.asarray(rng.random((5, 4)) > 0.3).at[0].set(False)
    g = jnp.where(alive[:, None], jnp.asarray(rng.normal(size=(5, 9, 4)), jnp.float32), 0.0)
    fisher = 0.1 * np.eye(4) + np.einsum("bni,bnj->bij", g, g) / 9
    inverse = jnp.asarray(np.linalg.inv(fisher), jnp.float32)
    floor = jnp.asarray(1 / np.diagonal(fisher, axis1=1, axis2=2), jnp.float32)
    scores = _choices.cheapest_choice(
        GroupBlocks(inverse, floor), jnp.where(alive, w, 0.0), alive, 2
    )
    gone = np.asarray(~alive) | np.isfinite(scores)
    few = np.asarray(alive).sum(1) >= 2
    assert np.all(gone[few].sum(1) == 2)


@pytest.mark.parametrize("size", [1, 3, 16, 20])
def test_group_saliency_by_elimination_and_by_factor(size):
    rng = np.random.default_rng(size)
    root = rng.normal(size=(4, size, size + 5))
    fisher = root @ np.swapaxes(root, 1, 2) / size + 0.1 * np.eye(size)
    w = rng.normal(size=(4, size))
    inverse = np.linalg.inv(fisher)
    blocks = GroupBlocks(
        jnp.asarray(inverse, jnp.float32),
        jnp.asarray(1 / np.diagonal(fisher, axis1=1, axis2=2), jnp.float32),
    )
    got = pruning.BlocksOf(size).cost(blocks, jnp.asarray(w, jnp.float32), jnp.ones(w.shape, bool))
    want = np.einsum("bi,bij,bj->b", w, fisher, w) / 2
    np.testing.assert_allclose(got, np.repeat(want[:, None], size, 1), rtol=2e-3)


def step(**options):
    params, gradients = problem()
    of_step = {k: options.pop(k) for k in ("sparsity", "score", "blocks") if k in options}
    return pruning.prune_step(
        params,
        pruning.initial_mask(params),
        rows.as_rows(gradients, params),
        **{"sparsity": 0.5, "damping": 0.1, **of_step},
        scope=Scope(**{"path_filter": "", **options}),
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": pruning.NofM(2, 3)}, r"multiple of 3.*\['a'\].*\(4, 8, 3\)"),
        ({"pattern": pruning.BlocksOf(4, axis=-1)}, r"multiple of 4.*\['a'\]"),
        ({"pattern": pruning.BlocksOf(4, axis=2)}, r"multiple of 4.*\['a'\]"),
        ({"pattern": pruning.Slices(axis=2)}, r"does not have.*path_filter"),
        ({"pattern": pruning.NofM(2, 4), "output_axis": 2}, r"output_axis=2 .*\['b'\]"),
        ({"pattern": pruning.NofM(2, 4), "sparsity": 0.6}, r"at most 64 of 128"),
        ({"pattern": pruning.NofM(2, 4), "blocks": 6}, "multiples of 4"),
        ({"pattern": pruning.Slices(), "blocks": 16}, "blocks='leaf'"),
        *(
            ({"score": "greedy", "pattern": pruning.Slices(), "blocks": blocks}, "one size, got Sl")
            for blocks in (None, 16, "leaf")
        ),
        ({"sparsity": 1.0}, "allow_empty_layers"),
        ({"sparsity": {"a": 1.0, "b": 0.1}}, r"\['a'\].*allow_empty_layers"),
        ({"sparsity": {"a": 0.5}}, "structure"),
        ({"sparsity": {"a": 0.5, "b": 0.5}, "path_filter": "a"}, "must be 0"),
        ({"budget": "even"}, "'global', 'uniform', 'erk'"),
        ({"budget": "uniform", "costs": {"a": 1, "b": 2}}, "budget='global'"),
        ({"costs": {"a": 1}}, "structure"),
        ({"costs": {"a": 0, "b": 2}}, r"costs\['a'\]"),
        ({"costs": {"a": 2**30, "b": 3}}, "smaller units"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        step(**options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pruning.NofM(4, 4),
        lambda: pruning.NofM(0, 4),
        lambda: pruning.BlocksOf(0),
    ],
)
def test_patterns_that_are_none(make):
    with pytest.raises(ValueError, match=r"must be"):
        make()


@pytest.mark.wrong_types
def test_patterns_of_wrong_type():
    with pytest.raises(TypeError, match="pattern must be a Pattern"):
        step(pattern="2:4")
    with pytest.raises(TypeError, match="axis must be a Python int"):
        pruning.Slices(axis=1.0)


@pytest.mark.parametrize("pattern", [pruning.NofM(2, 4), pruning.BlocksOf(4)])
def test_patterns_lie_along_the_inputs_wherever_those_are(pattern):
    w, g = (
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32),
        jnp.ones((3, 4, 8)),
    )

    def groups(weights, gradients, **options):
        _, mask, _ = pruning.prune_step(
            weights,
            jnp.ones(weights.shape, bool),
            rows.as_rows(gradients, weights),
            0.5,
            damping=0.1,
            score="magnitude",
            scope=Scope(pattern=pattern, **options),
        )
        return np.asarray(mask)

    outputs_first = groups(w, g, output_axis=0)
    np.testing.assert_array_equal(groups(w.T, g.swapaxes(1, 2)).T, outputs_first)
    alive = outputs_first.reshape(4, 2, 4).sum(2)
    assert set(alive.ravel().tolist()) == ({2} if isinstance(pattern, pruning.NofM) else {0, 4})


def test_slices_are_outputs_wherever_those_are():
    w, g = jnp.arange(1.0, 33.0).reshape(4, 8), jnp.ones((3, 4, 8))
    for axis in (0, -1):
        _, mask, _ = pruning.prune_step(
            w,
            jnp.ones((4, 8), bool),
            rows.as_rows(g, w),
            0.5,
            damping=0.1,
            score="magnitude",
            scope=Scope(pattern=pruning.Slices(), output_axis=axis),
        )
        outputs = np.asarray(mask).all(axis=1 if axis == 0 else 0)
        assert outputs.sum() == outputs.size // 2


@pytest.mark.parametrize("pattern", [pruning.BlocksOf(4), pruning.Slices(axis=0)])
def test_groups_that_are_pruned_in_part_are_refused(pattern):
    mask = {"a": jnp.ones(SHAPES["a"], bool), "b": jnp.ones(SHAPES["b"], bool).at[2, 1].set(False)}
    params, gradients = problem()
    with pytest.raises(ValueError, match=r"1 groups of params\['b'\] are pruned in part"):
        pruning.prune_step(
            params,
            mask,
            rows.as_rows(gradients, params),
            0.5,
            damping=0.1,
            scope=Scope(path_filter="", pattern=pattern),
        )


@pytest.mark.parametrize(("shape", "n", "sparsity"), [((4, 1), 2, 0.5), ((8, 1), 1, 0.75)])
def test_n_of_m_leaves_no_layer_without_weights_however_small(shape, n, sparsity):
    w = jnp.ones(shape)
    _, mask, info = pruning.prune_step(
        w,
        jnp.ones(shape, bool),
        rows.as_rows(jnp.ones((2, *shape)), w),  # fewer gradients than a group has weights
        sparsity,
        damping=0.1,
        scope=Scope(pattern=pruning.NofM(n, 4)),
    )
    assert int(info.num_alive) == n * w.size // 4
    assert np.all(np.asarray(mask).reshape(-1, 4).sum(1) == n)


@pytest.mark.parametrize("score", ["mfac", "magnitude", "obd"])
def test_empty_leaves_have_no_slices(score):
    params = {"e": jnp.zeros((4, 0)), "w": jnp.arange(12.0).reshape(4, 3)}
    g = rows.as_rows({"e": jnp.zeros((2, 4, 0)), "w": jnp.ones((2, 4, 3))}, params)
    _, mask, info = pruning.prune_step(
        params,
        pruning.initial_mask(params),
        g,
        0.5,
        damping=0.1,
        score=score,
        scope=Scope(path_filter="", pattern=pruning.Slices()),
    )
    assert mask["e"].shape == (4, 0)
    assert int(info.num_pruned) == 4


@pytest.mark.parametrize("damping", [1e-3, 1e-5, 1e-8])
def test_slices_of_a_leaf_below_n_do_not_cancel(damping):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)}
    g = rng.normal(size=(256, 8, 16)).astype(np.float32)
    scope = Scope(pattern=pruning.Slices())
    selection = select(scope, params)
    held = rows.as_rows({"w": jnp.asarray(g)}, params)
    given = _problem.Problem(
        params,
        pruning.initial_mask(params),
        held,
        jnp.float32(damping),
        selection,
        _blocks.cut_into_blocks("leaf", selection),
        _problem.Grams(held),
    )
    got = np.asarray(_scores.SCORES["mfac"].function(given)["w"])
    np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape))
    flat = g.swapaxes(1, 2).reshape(256, 128)
    inverse = oracles.inverse(flat, damping)
    w = np.asarray(params["w"].T, np.float64)
    blocks = [inverse[8 * i : 8 * i + 8, 8 * i : 8 * i + 8] for i in range(16)]
    want = [w[i] @ np.linalg.solve(b, w[i]) / 2 for i, b in enumerate(blocks)]
    np.testing.assert_allclose(got[0], want, rtol=1e-4)


def test_a_known_mask_is_checked_while_a_caller_is_traced():
    w, g = jnp.arange(1.0, 17.0).reshape(4, 4), rows.as_rows(jnp.ones((3, 4, 4)))
    mask = jnp.ones((4, 4), bool)
    options = {"damping": 0.1, "scope": Scope(pattern=pruning.BlocksOf(2))}
    torn = mask.at[0, 0].set(False)

    def step(w, mask):
        return pruning.prune_step(w, mask, g, 0.5, **options)[1]

    assert int(jnp.sum(~jax.jit(lambda w: step(w, mask))(w))) == 8
    with pytest.raises(ValueError, match="are pruned in part already"):
        jax.jit(lambda w: step(w, torn))(w)


@dataclass(frozen=True)
class FirstStays(Pattern):
    """The first of four neighbours never goes, the others go one by one."""

    @property
    def group_size(self):
        return 4

    @property
    def removable(self):
        return 0.75

    def groups(self, shape, output_axis, name):
        return Groups(4)

    def combine(self, scores, alive):
        return scores.at[:, 0].set(jnp.inf)

    def cost(self, blocks, weights, alive):
        return (weights**2 / 2).at[..., 0].set(jnp.inf)


class NoRule(FirstStays):
    """It does not say which of a group go."""

    combine, cost = Pattern.combine, Pattern.cost


@pytest.mark.parametrize("score", ["mfac", "magnitude"])
def test_a_rule_of_a_pattern_of_your_own_holds(score):
    w = jnp.arange(1.0, 17.0).reshape(4, 4)
    held = rows.as_rows(jnp.ones((3, 4, 4)))
    _, mask, _ = pruning.prune_step(
        w,
        pruning.initial_mask(w),
        held,
        0.75,
        damping=0.1,
        score=score,
        scope=Scope("", FirstStays()),
    )
    np.testing.assert_array_equal(mask, np.eye(4, dtype=bool)[:1].repeat(4, 0))


def test_greedy_masks_refuse_a_rule_that_they_do_not_know():
    w = jnp.ones((4, 4))
    held, scope = rows.as_rows(jnp.ones((3, 4, 4))), Scope("", FirstStays())
    with pytest.raises(ValueError, match="'greedy' cannot follow FirstStays"):
        pruning.prune_step(
            w,
            pruning.initial_mask(w),
            held,
            0.5,
            damping=0.1,
            score="greedy",
            blocks=4,
            scope=scope,
        )
    assert {setting.score for setting in pruning.default_settings(FirstStays())} == {
        "mfac",
        "magnitude",
    }
    with pytest.raises(ValueError, match="expected it to override combine and cost"):
        Scope("", NoRule())
