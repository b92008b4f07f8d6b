"""One contract for every pattern, score, update, budget and storage, in the package or not.

A case is the default step with one part replaced. What follows holds for all of them, through
``prune_step`` and through ``prune``.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import outside
import pytest

import mfac_jax
from mfac_jax import pruning, rows
from mfac_jax.inverse import GroupBlocks, _whole_algebra
from mfac_jax.pruning import Scope, _budgets, _targets
from mfac_jax.pruning._scope import select
from mfac_jax.rows import Dense

N = 8
SHAPES = {"a": {"bias": (8,), "kernel": (4, 8)}, "b": {"kernel": (8, 4)}}
KERNELS = ("a", "b")
DAMPING = 0.1


def draw(seed, *lead, shapes=SHAPES, dtype=np.float32):
    """Normal numbers that float16 and bfloat16 hold exactly, as a tree like the parameters."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        sixteenths = np.round(16 * rng.normal(size=(*lead, *shape))).clip(-63, 63)
        return jnp.asarray(sixteenths / 16, dtype)

    return jax.tree.map(leaf, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


def first_layers_first(sparsity, shapes):
    """A budget: half of what goes is of the first layer."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    gone = sparsity * sum(sizes)
    return [gone / 2 / sizes[0], *(gone / 2 / sum(sizes[1:]) for _ in sizes[1:])]


class Case(NamedTuple):
    """The parts of a step."""

    pattern: pruning.Pattern = pruning.Unstructured()
    score: Any = "mfac"
    update: Any = "joint"
    budget: Any = "global"
    storage: rows.Storage = Dense()
    blocks: Any = None

    @property
    def scope(self):
        return Scope(pattern=self.pattern, budget=self.budget)

    def step(self, params, mask, held, sparsity, **options):
        return pruning.prune_step(
            params,
            mask,
            held,
            sparsity,
            score=self.score,
            update=self.update,
            blocks=self.blocks,
            scope=self.scope,
            **{"damping": DAMPING, **options},
        )


PATTERNS = {
    "unstructured": pruning.Unstructured(),
    "2:4": pruning.NofM(2, 4),
    "blocks of 4": pruning.BlocksOf(4),
    "slices": pruning.Slices(),
    "diagonals, outside": outside.Diagonals(),
}
SCORES = {
    "mfac": "mfac",
    "greedy": "greedy",
    "obd": "obd",
    "magnitude": "magnitude",
    "taylor, outside": outside.taylor,
}
UPDATES = {
    "joint": "joint",
    "reference": "reference",
    "none": "none",
    "bounded joint, outside": outside.bounded_joint,
}
BUDGETS = {
    "global": "global",
    "uniform": "uniform",
    "erk": "erk",
    "half of the first, outside": first_layers_first,
}
STORAGES = {
    "flat, float32": Dense(),
    "leaf, float32": Dense(packing="leaf"),
    "flat, bfloat16": Dense(jnp.bfloat16),
    "leaf, bfloat16": Dense(jnp.bfloat16, packing="leaf"),
    "float16, outside": outside.Half(),
}
BLOCKS = {"blocks of 16": 16, "a block a leaf": "leaf", "within outputs": pruning.WithinOutputs(4)}

CASES = {
    **{name: Case(pattern=pattern) for name, pattern in PATTERNS.items()},
    **{
        name: Case(score=score, blocks=16 if score == "greedy" else None)
        for name, score in SCORES.items()
    },
    **{name: Case(update=update) for name, update in UPDATES.items()},
    **{name: Case(budget=budget) for name, budget in BUDGETS.items()},
    **{name: Case(storage=storage) for name, storage in STORAGES.items()},
    **{name: Case(blocks=blocks) for name, blocks in BLOCKS.items()},
    # Patterns whose groups have no one size, in the blocks that they allow.
    "slices, a block a leaf": Case(pruning.Slices(), blocks="leaf"),
    "diagonals, a block a leaf": Case(outside.Diagonals(), blocks="leaf"),
    "2:4, greedy": Case(pruning.NofM(2, 4), "greedy", blocks=16),
    "blocks of 4, greedy": Case(pruning.BlocksOf(4), "greedy", blocks=16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def params():
    return draw(0)


@pytest.fixture(scope="module")
def gradients():
    return draw(1, N)


def hold(case, gradients, params):
    return case.storage.hold(gradients, params)


def groups_of(case, tree):
    """The prunable leaves of a tree, a group a row."""
    selection = select(case.scope, draw(0))
    leaves = [np.asarray(leaf).reshape(-1) for leaf in selection.leaves(tree)]
    return [
        leaf[slice(None) if groups.order is None else groups.order].reshape(-1, groups.size)
        for leaf, groups in zip(leaves, selection.groups, strict=True)
    ]


def check_counts(case, mask, sparsity):
    """As many weights are pruned as there can be without more than was asked for."""
    pattern, scope = case.pattern, case.scope
    pruned = [int(np.sum(~leaf)) for leaf in groups_of(case, mask)]
    largest = max(select(scope, draw(0)).group_sizes) if pattern.prunes_whole_groups else 1
    if case.budget == "global":
        assert 0 <= round(sparsity * 64) - sum(pruned) < largest
    else:
        budget = _budgets.as_budget(case.budget)
        wanted = _targets.layer_counts(sparsity, budget, select(scope, draw(0)))
        assert wanted.sum() == round(sparsity * 64)
        np.testing.assert_array_equal(pruned, wanted)


def check_mask(case, mask, before):
    """Whole groups go, and nothing comes back."""
    for new, old in zip(groups_of(case, mask), groups_of(case, before), strict=True):
        assert not np.any(new & ~old)
        if case.pattern.prunes_whole_groups:
            assert np.all(new == new[:, :1])
        else:
            least = round((1 - case.pattern.removable) * new.shape[1])
            assert np.all(new.sum(axis=1) >= least)


def check_params(new, mask, old):
    """Zeros where pruned, and what may not be pruned is untouched bit for bit."""
    assert jax.tree.map(lambda w: (w.shape, w.dtype), new) == jax.tree.map(
        lambda w: (w.shape, w.dtype), old
    )
    for layer in KERNELS:
        kernel, alive = new[layer]["kernel"], np.asarray(mask[layer]["kernel"])
        assert np.all(np.isfinite(kernel))
        assert np.all(np.asarray(kernel)[~alive] == 0)
    np.testing.assert_array_equal(new["a"]["bias"], old["a"]["bias"])
    assert np.all(np.asarray(mask["a"]["bias"]))


@every_case
def test_two_steps(case, params, gradients):
    mask, held = pruning.initial_mask(params), hold(case, gradients, params)
    before = jax.tree.map(np.array, (params, mask, held))
    for sparsity in (0.27, 0.45):
        new, new_mask, info = case.step(params, mask, held, sparsity)
        assert bool(info.accepted)
        check_counts(case, new_mask, sparsity)
        check_mask(case, new_mask, mask)
        check_params(new, new_mask, params)
        pruned = sum(int(np.sum(~leaf)) for leaf in groups_of(case, new_mask))
        assert (int(info.num_pruned), int(info.num_alive)) == (pruned, 64 - pruned)
        jax.tree.map(np.testing.assert_array_equal, (params, mask, held), before)
        params, mask = new, new_mask
        before = jax.tree.map(np.array, (params, mask, held))


@functools.cache
def jitted(case):
    """One compiled step a case, for all tests."""
    return jax.jit(functools.partial(case.step, sparsity=0.4))


@every_case
def test_a_step_is_the_same_under_jit(case, params, gradients):
    held = hold(case, gradients, params)
    _, mask, _ = case.step(params, pruning.initial_mask(params), held, 0.2)
    want, want_mask, want_info = case.step(params, mask, held, 0.4)
    new, new_mask, info = jitted(case)(params, mask, held)
    jax.tree.map(np.testing.assert_array_equal, new_mask, want_mask)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, new, want)
    jax.tree.map(close, info, want_info)


@every_case
def test_a_step_takes_what_is_stored_whatever_the_storage(case, params, gradients):
    """The gradients are numbers that every storage holds exactly."""
    mask = pruning.initial_mask(params)
    want = case._replace(storage=Dense()).step(params, mask, hold(Case(), gradients, params), 0.4)
    for storage in {outside.Host(), case.storage} - {Dense()}:
        held = storage.hold(gradients, params)
        new, new_mask, _ = case._replace(storage=storage).step(params, mask, held, 0.4)
        jax.tree.map(np.testing.assert_array_equal, new_mask, want[1])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, new, want[0])


@every_case
def test_what_is_not_finite_is_refused(case, params, gradients):
    def with_nan(tree):
        kernel = tree["b"]["kernel"].at[1, 2].set(jnp.nan)
        return {**tree, "b": {"kernel": kernel}}

    bad, bad_gradients = with_nan(params), with_nan(gradients)
    held, mask = hold(case, gradients, params), pruning.initial_mask(params)
    with pytest.raises(FloatingPointError, match=r"params\['b'\]\['kernel'\] has NaN or Inf"):
        case.step(bad, mask, held, 0.4)
    with pytest.raises(FloatingPointError, match=r"params\['b'\]\['kernel'\] has NaN or Inf"):
        run(case, bad)
    # Storage may refuse the gradients, or the step does.
    with pytest.raises(
        FloatingPointError,
        match=r"(row 1 of gradients|gradient 1 of rows must be .*\['b'\]\['kernel'\])",
    ):
        case.step(params, mask, hold(case, bad_gradients, params), 0.4)
    # Where nothing can be raised, nothing is done.
    new, new_mask, info = jitted(case)(bad, mask, held)
    assert not bool(info.accepted)
    jax.tree.map(np.testing.assert_array_equal, (new, new_mask), (bad, mask))
    with pytest.raises(ValueError, match=r"damping must be finite and greater than 0, got nan"):
        case.step(params, mask, held, 0.4, damping=float("nan"))
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got nan"):
        case.step(params, mask, held, float("nan"))


X = jax.random.normal(jax.random.key(0), (32, 4))
BATCHES = [(X[i : i + 4], jnp.tanh(X[i : i + 4] * 2)) for i in range(0, 32, 4)]


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.mean((hidden @ params["b"]["kernel"] - y) ** 2)


def unreadable():
    """Batches that nobody may read."""
    raise AssertionError("a batch was read")
    yield


def run(case, params, *, batches=BATCHES, **options):
    settings = [pruning.Setting(case.score, case.update, case.blocks, DAMPING)]
    chosen = {
        "steps": (0.27, 0.45),
        "scope": case.scope,
        "gradients": pruning.Gradients(N, storage=case.storage, history=0),
        "search": pruning.Search(settings, descents=(), num_calibration=2),
    }
    return pruning.prune(params, loss_fn, batches, 0.45, progress=False, **{**chosen, **options})


@every_case
def test_two_steps_of_prune(case, params):
    masks = [pruning.initial_mask(params)]

    def fine_tune(params, mask):
        masks.append(mask)
        return params

    pruned = run(case, params, fine_tune=fine_tune)
    jax.tree.map(np.testing.assert_array_equal, masks[-1], pruned.mask)
    for sparsity, before, after in zip((0.27, 0.45), masks, masks[1:], strict=False):
        check_counts(case, after, sparsity)
        check_mask(case, after, before)
    check_params(pruned.params, pruned.mask, params)
    counts = [sum(int(np.sum(~leaf)) for leaf in groups_of(case, mask)) for mask in masks[1:]]
    assert [step.num_pruned for step in pruned.report.steps] == counts
    for part in (case.score, case.update):
        assert (part if isinstance(part, str) else part.__name__) in str(pruned.report)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_prune_is_the_same_in_both_packings(pattern, params):
    both = [run(Case(pattern, storage=Dense(packing=name)), params) for name in ("flat", "leaf")]
    jax.tree.map(np.testing.assert_array_equal, both[0].mask, both[1].mask)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, both[0].params, both[1].params)


def flat(tree):
    """The kernels as one vector."""
    return oracles.flat([tree[layer]["kernel"] for layer in KERNELS])


def fisher(gradients, alive):
    leaves = [np.asarray(gradients[layer]["kernel"]).reshape(N, -1) for layer in KERNELS]
    return oracles.fisher(np.concatenate(leaves, axis=1) * alive, DAMPING)


def joint(w, f, gone, kept):
    rhs = f[np.ix_(kept, gone)] @ w[gone]
    return np.linalg.solve(f[np.ix_(kept, kept)], rhs)


def is_least(moved, w, f, gone, kept):
    """The gradient of the quadratic model over the kept weights is 0."""
    parts = f[np.ix_(kept, kept)] @ moved, f[np.ix_(kept, gone)] @ w[gone]
    assert np.linalg.norm(parts[0] - parts[1]) <= 1e-10 * np.linalg.norm(parts[1])


def is_sum_of_single_updates(moved, w, f, gone, kept):
    alive = gone | kept
    inverse = np.zeros_like(f)
    inverse[np.ix_(alive, alive)] = np.linalg.inv(f[np.ix_(alive, alive)])
    v = np.where(gone, w / np.where(gone, np.diag(inverse), 1), 0)
    np.testing.assert_allclose(moved, -(inverse @ v)[kept], rtol=1e-8, atol=1e-12)


def is_nothing(moved, w, f, gone, kept):
    np.testing.assert_array_equal(moved, 0)


def is_joint_and_bounded(moved, w, f, gone, kept):
    want = joint(w, f, gone, kept)
    scale = min(1.0, np.linalg.norm(w[gone]) / np.linalg.norm(want))
    np.testing.assert_allclose(moved, scale * want, rtol=1e-8, atol=1e-12)


PROMISES = {
    "joint": is_least,
    "reference": is_sum_of_single_updates,
    "none": is_nothing,
    "bounded joint, outside": is_joint_and_bounded,
}


@pytest.mark.x64
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_update_keeps_what_it_promises(update, pattern):
    params, gradients = draw(0, dtype=np.float64), draw(1, N, dtype=np.float64)
    case = Case(pattern=PATTERNS[pattern], update=UPDATES[update])
    held, mask = hold(case, gradients, params), pruning.initial_mask(params)
    for sparsity in (0.2, 0.45):
        new, new_mask, _ = case.step(params, mask, held, sparsity)
        w, alive, kept = flat(params), flat(mask) > 0, flat(new_mask) > 0
        moved = (flat(new) - w)[kept]
        PROMISES[update](moved, w, fisher(gradients, alive), alive & ~kept, kept)
        params, mask = new, new_mask


@pytest.mark.x64
def test_an_update_is_bounded_where_the_joint_one_is_too_long():
    """Small gradients have to make up for large ones."""
    params, gradients = draw(0, dtype=np.float64), draw(1, N, dtype=np.float64)
    gradients["a"]["kernel"] *= 16
    sparsity = {"a": {"bias": 0, "kernel": 0.9}, "b": {"kernel": 0}}
    norms = {}
    for update in ("joint", outside.bounded_joint):
        held, mask = hold(Case(), gradients, params), pruning.initial_mask(params)
        _, _, info = Case(update=update).step(params, mask, held, sparsity)
        norms[update] = float(info.update_norm)
    assert norms["joint"] > 2 * float(info.removed_norm)
    np.testing.assert_allclose(norms[outside.bounded_joint], info.removed_norm, rtol=1e-12)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_score_in_every_pattern(score, pattern, params, gradients):
    case = Case(PATTERNS[pattern], SCORES[score], "none", blocks=16 if score == "greedy" else None)
    mask, held = pruning.initial_mask(params), hold(case, gradients, params)
    if score == "greedy" and case.pattern.group_size is None:
        with pytest.raises(ValueError, match=r"one size, got .*; use score='mfac'"):
            case.step(params, mask, held, 0.4)
        return
    new, new_mask, info = case.step(params, mask, held, 0.4)
    assert bool(info.accepted)
    check_counts(case, new_mask, 0.4)
    check_mask(case, new_mask, mask)
    check_params(new, new_mask, params)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_what_a_pattern_answers(pattern):
    assert hash(pattern) == hash(type(pattern)(**vars(pattern)))
    assert pattern == type(pattern)(**vars(pattern))
    shape = (8, 12)
    groups = pattern.groups(shape, -1, "['w']")
    order = np.arange(96) if groups.order is None else groups.order
    np.testing.assert_array_equal(np.sort(order), np.arange(96))
    assert 96 % groups.size == 0
    assert 96 % groups.num_outputs == 0
    assert pattern.group_size in (None, groups.size)
    assert 0 < pattern.removable <= 1

    rng = np.random.default_rng(0)
    roots = rng.normal(size=(3, groups.size, 2 * groups.size))
    fishers = roots @ roots.swapaxes(1, 2)
    inverses = np.linalg.inv(fishers)
    floor = 1 / np.diagonal(fishers, axis1=1, axis2=2)
    w = rng.normal(size=(3, groups.size))
    blocks = GroupBlocks(*(jnp.asarray(x, jnp.float32) for x in (inverses, floor)))
    weights, alive = jnp.asarray(w, jnp.float32), jnp.ones(w.shape, bool)
    cost = np.asarray(pattern.cost(blocks, weights, alive))
    combined = np.asarray(pattern.combine(weights**2, alive))
    assert cost.shape == combined.shape == w.shape
    if pattern.prunes_whole_groups:
        want = np.einsum("bi,bij,bj->b", w, fishers, w) / 2
        np.testing.assert_allclose(cost, np.broadcast_to(want[:, None], w.shape), rtol=1e-3)
        want = np.sum(w**2, axis=1, keepdims=True)
        np.testing.assert_allclose(combined, np.broadcast_to(want, w.shape), rtol=1e-5)
    else:
        for scores in (cost, combined):
            going = round(pattern.removable * groups.size)
            np.testing.assert_array_equal(np.isfinite(scores).sum(axis=1), going)


def test_a_pattern_from_outside_names_the_leaf_that_it_does_not_fit(params, gradients):
    case = Case(outside.Diagonals())
    message = r"Diagonals\(\) needs matrices, but params\['a'\]\['bias'\] has shape \(8,\)"
    with pytest.raises(ValueError, match=message):
        pruning.prune_step(
            params,
            pruning.initial_mask(params),
            hold(case, gradients, params),
            0.4,
            damping=DAMPING,
            scope=Scope(path_filter="", pattern=case.pattern),
        )


def test_diagonals_are_those_of_the_matrix():
    w = jnp.arange(1.0, 13.0).reshape(3, 4)
    _, mask, _ = pruning.prune_step(
        w,
        jnp.ones((3, 4), bool),
        rows.as_rows(jnp.ones((2, 3, 4))),
        0.5,
        damping=DAMPING,
        score="magnitude",
        scope=Scope(pattern=outside.Diagonals()),
    )
    # The squares of 4, 5, 10 and of 3, 8, 9 add up to least.
    np.testing.assert_array_equal(np.asarray(w)[~mask], [3, 4, 5, 8, 9, 10])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Products(rows.GradientRows):
    """Rows that answer products alone."""

    held: rows.DenseRows
    layout = property(lambda self: self.held.layout)
    num_rows = property(lambda self: self.held.num_rows)
    dtype = property(lambda self: self.held.dtype)

    def dots(self, vector):
        return self.held.dots(vector)

    def combine(self, coefficients, *, vector=None, scale=None):
        return self.held.combine(coefficients, vector=vector, scale=scale)

    def gram(self, mask=None):
        return self.held.gram(mask)


class WritableProducts(Products, rows.WritableRows):
    """They can be written, but these tests write nothing."""

    put = write = clear = restrict = None


@dataclass(frozen=True)
class OnlyProducts(rows.Storage):
    """A storage whose rows have no columns to read."""

    writable: bool = True

    def empty(self, params, num_rows):
        held = Dense().empty(params, num_rows)
        return WritableProducts(held) if self.writable else Products(held)


def test_columns_are_read_only_where_they_are_needed(params, gradients):
    held, mask = hold(Case(), gradients, params), pruning.initial_mask(params)
    steps = [("magnitude", "joint"), ("obd", "none"), (outside.taylor, outside.bounded_joint)]
    for score, update in steps:
        case = Case(score=score, update=update)
        want = case.step(params, mask, held, 0.4)
        jax.tree.map(
            np.testing.assert_array_equal, case.step(params, mask, Products(held), 0.4), want
        )
    for case, what in [
        (Case(), "score='mfac'"),
        (Case(score="magnitude", update="reference"), "update='reference'"),
        (Case(score="magnitude", blocks=16), "blocks=16"),
        (Case(score=pruning.Score(outside.taylor, reads_columns=True)), "score='taylor'"),
        (Case(score="magnitude", update=pruning.Update(outside.bounded_joint, True)),
         "update='bounded_joint'"),
    ]:  # fmt: skip
        words = (
            r"needs rows whose columns can be read .*ColumnRows\), got \w*Products, which cannot"
        )
        with pytest.raises(TypeError, match=f"^{what} {words}"):
            case.step(params, mask, Products(held), 0.4)
        # In prune the error comes before any batch is read.
        storage = r"storage=OnlyProducts\(writable=True\)"
        with pytest.raises(TypeError, match=f"^{what} with {storage} {words}"):
            run(case._replace(storage=OnlyProducts()), params, batches=unreadable())
        given = pruning.Gradients(N, given=Products(held))
        with pytest.raises(TypeError, match=f"^{what} with the given gradients {words}"):
            run(case, params, batches=unreadable(), gradients=given)


class FromArrays(outside.Half):
    """Its rows begin as numbers, which no trace has."""

    def empty(self, params, num_rows):
        made = super().empty(params, num_rows)
        return replace(made, matrix=jnp.asarray(np.array(made.matrix)))


def test_the_kind_of_rows_is_known_from_one_row_outside_of_a_trace(params):
    with jax.checking_leaks():
        run(Case(storage=FromArrays()), params)


def test_the_mask_before_the_first_step_is_read_once(params, monkeypatch):
    reads, pruned_of_leaves = [], _targets.pruned_of_leaves
    monkeypatch.setattr(
        _targets, "pruned_of_leaves", lambda mask: (reads.append(mask), pruned_of_leaves(mask))[1]
    )
    run(Case(pruning.BlocksOf(4), "magnitude", "none"), params, steps=4)
    assert len(reads) == 1


def test_few_weights_are_one_block_whose_columns_are_read(params):
    """The gradients of all steps that are kept count."""
    case = Case(score="magnitude", storage=OnlyProducts())
    many = pruning.Gradients(32, storage=case.storage, history=1)
    with pytest.raises(TypeError, match=r"^one block of at most n=64 weights with storage=Only"):
        run(case, params, batches=unreadable(), gradients=many)
    with pytest.raises(AssertionError, match="a batch was read"):
        run(case, params, batches=unreadable())


def test_rows_that_cannot_be_written_are_refused_before_a_batch_is_read(params, gradients):
    case = Case(score="magnitude", storage=OnlyProducts(writable=False))
    words = (
        r"with storage=OnlyProducts\(writable=False\) needs rows that can be written "
        r"\(mfac_jax\.rows\.WritableRows\), got Products, which cannot"
    )
    with pytest.raises(TypeError, match=f"^prune {words}"):
        run(case, params, batches=unreadable())
    given = pruning.Gradients(N, given=hold(Case(), gradients, params), storage=case.storage)
    with pytest.raises(TypeError, match=f"^prune {words}"):
        run(case, params, batches=unreadable(), gradients=given)
    with pytest.raises(TypeError, match=f"^collecting gradients {words}"):
        mfac_jax.collect_gradients(loss_fn, params, unreadable(), 2, storage=case.storage)
    # One step with given gradients stores none.
    run(case, params, steps=(0.45,), gradients=given)


class Odd(NamedTuple):
    """What a pattern may get wrong."""

    groups: Any
    size: int | None
    words: str


@pytest.mark.parametrize(
    "odd",
    [
        Odd(pruning.Groups(5), None, r"one size: expected a divisor of 32 weights, got 5"),
        Odd(pruning.Groups(0), None, r"one size: expected a divisor of 32 weights, got 0"),
        Odd(pruning.Groups(4), 2, r"one size: expected 2 of 32 weights, got 4"),
        Odd(pruning.Groups(4, num_outputs=3), None, r"expected a divisor of 8 groups, got 3"),
        Odd(pruning.Groups(4, np.arange(31)), None, r"the places 0 \.\. 31, got \[ 0  1"),
        Odd(pruning.Groups(4, np.arange(32) + 1), None, r"the places 0 \.\. 31, got \[ 1  2"),
        Odd(pruning.Groups(4, np.arange(32) // 2), None, r"the places 0 \.\. 31, got \[ 0  0"),
        Odd(pruning.Groups(4, np.arange(32.0)), None, r"the places 0 \.\. 31, got \[ 0\.  1"),
        Odd(4, None, r"must be pruning\.Groups\(size, order, num_outputs\), got 4"),
        Odd([0, 1], None, r"must be pruning\.Groups\(size, order, num_outputs\), got \[0, 1\]"),
        Odd(None, None, r"must be pruning\.Groups\(size, order, num_outputs\), got None"),
        Odd(pruning.Groups("4"), None, r"must have an int as size, got '4'"),
        Odd(pruning.Groups(4, None, 2.0), None, r"must have an int as num_outputs, got 2\.0"),
    ],
)
def test_groups_that_do_not_make_up_a_leaf(odd, params, gradients):
    class Given(pruning.Pattern):
        group_size = odd.size

        def groups(self, shape, output_axis, name):
            return odd.groups

        def __repr__(self):
            return "Given()"

    case = Case(Given())
    words = r"the groups that Given\(\) makes of params\['a'\]\['kernel'\] of shape \(4, 8\).*"
    with pytest.raises((TypeError, ValueError), match=words + odd.words):
        case.step(params, pruning.initial_mask(params), hold(case, gradients, params), 0.4)


def half_of_groups(problem):
    """Half of what groups cost."""
    return problem.map_groups(HalfOfCost(problem.pattern))


@dataclass(frozen=True)
class HalfOfCost:
    pattern: pruning.Pattern

    def __call__(self, blocks, weights, alive):
        return self.pattern.cost(blocks, weights, alive) / 2


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_score_from_outside_that_knows_of_groups(pattern, params, gradients):
    mask = pruning.initial_mask(params)
    for case in (Case(pattern), Case(pattern, blocks="leaf")):
        held = hold(case, gradients, params)
        _, want, _ = case.step(params, mask, held, 0.4)
        halved = pruning.Score(half_of_groups, reads_columns=True, of_groups=True)
        _, got, _ = case._replace(score=halved).step(params, mask, held, 0.4)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("pattern", [pruning.Slices(), outside.Diagonals()])
@pytest.mark.parametrize("blocks", [16, (16, 16, 16, 16), pruning.WithinOutputs(4)])
def test_blocks_that_cut_groups_are_refused_for_every_score_of_groups(
    pattern, blocks, params, gradients
):
    case = Case(pattern, blocks=blocks)
    held, mask = hold(case, gradients, params), pruning.initial_mask(params)
    words = "do not fit into blocks smaller than a leaf"
    own = pruning.Score(half_of_groups, reads_columns=True, of_groups=True)
    for score in ("mfac", own):
        with pytest.raises(ValueError, match=words):
            case._replace(score=score).step(params, mask, held, 0.4)
        with pytest.raises(ValueError, match=words):
            run(case._replace(score=score), params, batches=unreadable())
    # A score that does not say what it reads is refused as it reads groups.
    for score in (half_of_groups, pruning.Score(half_of_groups, of_groups=True)):
        with pytest.raises(ValueError, match=words):
            case._replace(score=score).step(params, mask, held, 0.4)
    # Magnitude scores groups of any size, without the Fisher.
    _, got, _ = case._replace(score="magnitude").step(params, mask, held, 0.4)
    check_mask(case, got, mask)


def test_a_score_checks_the_pattern_and_the_blocks_before_any_work(params):
    def check(pattern, largest):
        raise ValueError(f"{pattern} with {largest} weights")

    case = Case(pruning.BlocksOf(4), pruning.Score(outside.taylor, check=check), blocks=16)
    with pytest.raises(ValueError, match=r"BlocksOf.* with 16 weights"):
        run(case, params, batches=unreadable())


def test_the_first_weight_of_a_group_scores_the_group(params, gradients):
    def places(problem):
        # The first row falls and the last row rises, so their groups would go in other orders.
        return jax.tree.map(
            lambda w: jnp.arange(w.size, dtype=w.dtype).reshape(w.shape)[::-1], problem.weights
        )

    score = pruning.Score(places, of_groups=True)
    case, mask = Case(pruning.Slices(0), score, "none"), pruning.initial_mask(params)
    scope = Scope("a/kernel", pruning.Slices(0))
    held = hold(case, gradients, params)
    _, got, _ = pruning.prune_step(
        params, mask, held, 0.5, damping=DAMPING, score=score, update="none", scope=scope
    )
    assert got["a"]["kernel"].all(axis=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"group_size": 4.0}, r"group_size of .* must be a Python int, got float"),
        ({"greedy_quota": 0}, r"greedy_quota of .* must be at least 1, got 0"),
        ({"removable": "half"}, r"removable of .* must be a number or a scalar array, got str"),
        ({"removable": 0}, r"removable of .* must be finite and greater than 0, got 0"),
        ({"removable": 1.5}, r"removable of .* must lie in \[0, 1\], got 1\.5"),
        ({"__hash__": None}, "pattern must be hashable"),
        ({"removable": 0.5}, "expected it to override combine and cost"),
    ],
)
def test_members_of_a_pattern_are_checked_as_a_scope_is_made(members, words):
    odd = type("Odd", (outside.Diagonals,), members)()
    with pytest.raises((TypeError, ValueError), match=words):
        Scope(pattern=odd)


@pytest.mark.parametrize(
    ("value", "got"), [(lambda w: None, "NoneType"), (lambda w: w[..., 0], r"float32\[")]
)
@pytest.mark.parametrize("method", ["combine", "cost"])
def test_scores_of_groups_of_another_form(method, value, got, params, gradients):
    odd = type("Odd", (outside.Diagonals,), {method: lambda self, *args: value(args[-2])})()
    case = Case(odd, "obd" if method == "combine" else "mfac", "none", blocks="leaf")
    words = rf"{method} of .* must return one .* for each weight: expected .*\], got {got}"
    with pytest.raises(TypeError, match=words):
        case.step(params, pruning.initial_mask(params), hold(case, gradients, params), 0.4)


def returns(value):
    def score_or_update(problem, *_):
        return value(problem.weights)

    return score_or_update


@pytest.mark.parametrize("part", ["score", "update"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (lambda w: w["a"], ValueError, "score_or_update returns.*structure"),
        (
            lambda w: jax.tree.map(lambda x: x[:2], w),
            ValueError,
            r"score_or_update returns.*\['a'\]\['bias'\].*expected \(8,\), got \(2,\)",
        ),
        (
            lambda w: jax.tree.map(lambda x: x > 0, w),
            TypeError,
            r"score_or_update returns.*\['a'\]\['bias'\].*bool\[8\]\. Convert it to float32\.$",
        ),
    ],
)
def test_scores_or_changes_of_another_form(part, value, error, words, params, gradients):
    case = Case()._replace(**{part: returns(value)})
    with pytest.raises(error, match=words):
        case.step(params, pruning.initial_mask(params), hold(case, gradients, params), 0.4)


@pytest.mark.wrong_types
@pytest.mark.parametrize("part", ["score", "update"])
def test_a_score_or_update_of_another_kind(part, params, gradients):
    case = Case()._replace(**{part: 3})
    with pytest.raises(TypeError, match=rf"{part} must be one of '.*' or a function, got 3"):
        case.step(params, pruning.initial_mask(params), hold(case, gradients, params), 0.4)
    kind = {"score": pruning.Score, "update": pruning.Update}[part]
    with pytest.raises(TypeError, match="function must be a function, got 'mfac'"):
        kind("mfac")
    with pytest.raises(TypeError, match="reads_columns must be a bool, got int"):
        kind(outside.taylor, reads_columns=1)


# The masked Gram matrix is the largest part of the work: O(d n^2). There is one over the alive
# weights, for scores and the reference's update, and one over those that stay, for the joint
# update. Magnitude and no update need none, and blocks are inverted by themselves. With a block
# a leaf, groups of no one size need one of each leaf.
GRAMS = [
    (Case(), 2),
    (Case(update="reference"), 1),
    (Case(update=outside.bounded_joint), 2),
    (Case(score="magnitude"), 1),
    (Case(score="obd", update="none"), 0),
    (Case(score="magnitude", update="none"), 0),
    (Case(score=outside.taylor, update="reference"), 1),
    (Case(blocks=16), 0),
    (Case(score="greedy", blocks=16), 0),
    (Case(pattern=pruning.BlocksOf(4)), 2),
    (Case(pattern=pruning.Slices()), 2),
    (Case(pattern=pruning.Slices(), update="none", blocks="leaf"), 2),
]


@pytest.mark.parametrize(("case", "count"), GRAMS)
def test_a_gram_matrix_is_computed_once_a_mask_in_a_step(case, count, params, gradients):
    storage = outside.Half()
    held = storage.hold(gradients, params)
    storage.reads.of.clear()
    case.step(params, pruning.initial_mask(params), held, 0.4)
    assert storage.reads.of["gram"] == count


WHOLE = [
    pruning.Setting("mfac", "joint", None, DAMPING, (1.0, 0.5)),
    pruning.Setting("mfac", "reference", None, DAMPING),
    pruning.Setting("magnitude", "none", None, DAMPING),
]
BOUNDED = pruning.Setting("mfac", outside.bounded_joint, None, DAMPING)
DESCENTS = (pruning.Descent(0.3, 0.1), pruning.Descent(0.03, 0.1))
LEAVES = [
    pruning.Setting("mfac", "none", "leaf", DAMPING),
    pruning.Setting("mfac", "none", "leaf", 10 * DAMPING),
]


@pytest.mark.parametrize(
    ("pattern", "settings", "descents", "history", "grams", "factors"),
    [
        # Over the alive weights, for the damping, all scores and the reference's update; and
        # over those that stay, for the joint update and the descents.
        (pruning.Unstructured(), WHOLE[:2], DESCENTS, 0, 2, 4),
        # The rows of each of two parts, one Gram matrix a part.
        (pruning.Unstructured(), WHOLE[:2], DESCENTS, 1, 4, 4),
        # Magnitude has a mask of its own, and needs no Gram matrix of it.
        (pruning.Unstructured(), WHOLE, (), 0, 2, 2),
        # Two updates of the same mask share a factor.
        (pruning.Unstructured(), [*WHOLE[:2], BOUNDED], (), 0, 2, 2),
        # Over the alive weights for the damping, and over each of two leaves, for all dampings.
        (pruning.Slices(), LEAVES, (), 0, 3, 4),
    ],
)
def test_a_gram_matrix_is_computed_once_a_mask_in_prune(
    pattern, settings, descents, history, grams, factors, params, monkeypatch
):
    """And it is factored once for each damping."""
    factored, factor = [], _whole_algebra.factor

    def count(gram, damping):
        factored.append(gram)
        return factor(gram, damping)

    monkeypatch.setattr(_whole_algebra, "factor", count)
    storage = outside.Half()
    run(
        Case(pattern=pattern),
        params,
        gradients=pruning.Gradients(N, storage=storage, history=history),
        search=pruning.Search(settings, descents=descents, num_calibration=2),
    )
    assert storage.reads.of["gram"] == 2 * grams
    assert len(factored) == 2 * factors


def test_an_inverse_is_made_once_a_mask(params, gradients):
    seen = []

    def score(problem):
        empty = jax.tree.map(jnp.zeros_like, problem.mask)
        seen.append(problem.inverse_over(problem.mask) is problem.inverse)
        seen.append(problem.inverse_over(empty) is problem.inverse_over(empty))
        seen.append(problem.inverse_over(empty) is not problem.inverse)
        with pytest.raises(ValueError, match="mask does not have the structure"):
            problem.inverse_over(problem.mask["a"])
        with pytest.raises(TypeError, match="must be boolean, got float32"):
            problem.inverse_over(problem.weights)
        return outside.taylor(problem)

    held, mask = hold(Case(), gradients, params), pruning.initial_mask(params)
    for blocks in (None, 16):
        Case(score=score, blocks=blocks).step(params, mask, held, 0.4)
    assert seen == [True] * 6


def test_settings_share_a_problem_if_their_blocks_are_the_same(params):
    """Blocks of the same sizes are not the same: a block a leaf is scored leaf by leaf."""
    seen = []

    def score(problem):
        seen.append(problem)
        return outside.taylor(problem)

    settings = [
        pruning.Setting(score, "none", blocks, DAMPING)
        for blocks in (None, "leaf", None, [16, 16], (16, 16), 16)
    ]
    run(
        Case(),
        params,
        steps=(0.45,),
        scope=Scope("a/kernel", pruning.Slices()),
        search=pruning.Search(settings, descents=(), num_calibration=2),
    )
    assert len(seen) == len({id(problem) for problem in seen}) == 4


@pytest.mark.parametrize("pattern", [pruning.Unstructured(), pruning.BlocksOf(4)])
def test_an_order_of_the_weights_is_made_only_for_what_reads_columns(pattern, params, gradients):
    orders = []

    def score(problem):
        orders.append((problem.blocks.order, problem.inverse.blocks.order))
        return outside.taylor(problem)

    held, mask = hold(Case(), gradients, params), pruning.initial_mask(params)
    for blocks in (None, 64, 16):
        Case(pattern, score, blocks=blocks).step(params, mask, held, 0.4)
    assert [order is None for pair in orders for order in pair] == [True] * 4 + [False] * 2
    # Greedy removal reads columns even if the Fisher is whole.
    steps = [
        Case(pattern, "greedy", blocks=blocks).step(params, mask, held, 0.4)
        for blocks in (None, 64, (64,))
    ]
    for other in steps[1:]:
        jax.tree.map(np.testing.assert_array_equal, other[:2], steps[0][:2])
    check_mask(Case(pattern), steps[0][1], mask)


@pytest.mark.parametrize("history", [0, 1])
@pytest.mark.parametrize("storage", [Dense(jnp.bfloat16, packing="leaf"), outside.Half()])
def test_given_gradients_are_used_as_they_are(storage, history, params, gradients):
    """Scores see the very object, and no other array of its size is alive beside it."""
    given, seen = storage.hold(gradients, params), []
    blocks = jax.tree.leaves(given)
    before = [np.array(block, np.float32) for block in blocks]
    sizes, grams = {block.size for block in blocks}, {(N, N), (2 * N, 2 * N)}

    def score(problem):
        parts = problem.rows.parts if history else (problem.rows,)
        stored = {id(block) for part in parts for block in jax.tree.leaves(part)}
        live = [x for x in jax.live_arrays() if x.size in sizes and x.shape not in grams]
        copies = [x for x in live if id(x) not in known | stored]
        seen.append((parts[0] is given, len(copies)))
        return outside.taylor(problem)

    known = {id(x) for x in jax.live_arrays()}
    run(
        Case(),
        params,
        gradients=pruning.Gradients(N, given=given, history=history),
        search=pruning.Search(
            [pruning.Setting(score, "joint", None, DAMPING)], descents=(), num_calibration=2
        ),
    )
    # The second step takes gradients of its own, beside the given ones if it may.
    assert [is_given for is_given, _ in seen] == [True, history == 1]
    assert seen[0][1] == 0
    for block, old in zip(blocks, before, strict=True):
        np.testing.assert_array_equal(np.asarray(block, np.float32), old)


# Static facts of the source.

PACKAGE = Path(mfac_jax.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
AT_HOME = [PACKAGE / "rows", *(PACKAGE / "pruning" / f"_{n}.py" for n in ("interface", "patterns"))]


def names_of_rows_and_patterns():
    found = {"Pattern", "Storage", "GradientRows"}
    classes = [*map(vars(pruning).get, pruning.__all__), *map(vars(rows).get, rows.__all__)]
    bases = (pruning.Pattern, rows.Storage, rows.GradientRows)
    return found | {c.__name__ for c in classes if inspect.isclass(c) and issubclass(c, bases)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_asks_what_kind_rows_and_patterns_are(path):
    """They answer what is asked of them: no `isinstance` outside their own modules."""
    if any(path.is_relative_to(home) for home in AT_HOME):
        return
    known = names_of_rows_and_patterns()
    assert {"DenseRows", "StackedRows", "WritableRows", "ColumnRows", "Dense"} <= known
    assert {"Unstructured", "NofM", "BlocksOf", "Slices"} <= known
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            kinds = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}
            assert not kinds & known, f"line {node.lineno}"


def public_functions():
    """Every function and method that a public namespace shows, with its name."""
    names = [m.name for m in pkgutil.iter_modules(mfac_jax.__path__) if m.name[0] != "_"]
    modules = [mfac_jax, *(importlib.import_module(f"mfac_jax.{name}") for name in names)]
    for module in modules:
        shown = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
        for name in shown:
            value = getattr(module, name)
            members = [(name, value)]
            if inspect.isclass(value):
                members = [(f"{name}.{k}", v) for k, v in vars(value).items() if k[0] != "_"]
            for label, member in members:
                function = getattr(member, "__func__", getattr(member, "fget", member))
                function = inspect.unwrap(function) if callable(function) else None
                if inspect.isfunction(function) and function.__module__.startswith("mfac_jax"):
                    yield f"{module.__name__}.{label}", function


def lines_of_code(function):
    """Lines of the body without the docstring, comments and empty lines."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return 0
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_public_functions_have_few_arguments_and_short_bodies():
    functions = dict(public_functions())
    assert {"mfac_jax.pruning.prune", "mfac_jax.rows.DenseRows.gram"} <= set(functions)
    assert lines_of_code(lines_of_code) == 7
    wide = {k: n for k, f in functions.items() if (n := len(inspect.signature(f).parameters)) > 12}
    assert wide == {}
    long = {k: n for k, f in functions.items() if (n := lines_of_code(f)) > 40}
    assert long == {}


def test_what_is_added_from_outside_is_short():
    """At most 60 lines each, from marker to marker."""
    sections = Path(outside.__file__).read_text().split("# -- ")[1:]
    assert [section.split(" --")[0] for section in sections] == [
        "A storage", "Rows in host memory", "A pattern", "A score", "An update",
    ]  # fmt: skip
    for section in sections:
        assert sum(bool(line.strip()) for line in section.splitlines()[1:]) <= 60


@pytest.mark.parametrize("history", [0, 2])
def test_prune_collects_gradients_in_host_memory(params, history):
    found = [
        run(
            case,
            params,
            steps=(0.2, 0.3, 0.45),
            gradients=pruning.Gradients(N, storage=case.storage, history=history),
        )
        for case in (Case(storage=outside.Host()), Case(storage=Dense()))
    ]
    jax.tree.map(np.testing.assert_array_equal, found[0].mask, found[1].mask)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found[0].params, found[1].params)
