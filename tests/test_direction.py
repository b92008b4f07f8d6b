"""Metrics, momentum, powers, lengths, weights and blocks against dense float64 matrices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import outside
import pytest
from jax import lax
from oracles import assert_close, flat

from mfac_jax import mfac_precondition, mfacw
from mfac_jax.optimizer import (
    ByAge,
    ByValue,
    Diagonal,
    Direction,
    Metric,
    SecondMoments,
    UnitNorm,
    Weights,
)
from mfac_jax.rows import Dense, Int8, TopK

D, M, LAMBDA = 27, 6, 0.05
DIAGONAL = {
    "b": jnp.array([0.5, 1.0, 4.0]),
    "w": jnp.linspace(0.1, 2.0, 24, dtype=jnp.float32).reshape(4, 6),
}
# The blocks of each leaf. A block has at least M weights: two outputs with 4 weights each.
EVERY = np.arange(D)
OUTPUTS = np.moveaxis(EVERY[3:].reshape(4, 6), -1, 0).reshape(3, 8)
LEAVES = {None: [[EVERY]], "leaf": [[EVERY[:3]], [EVERY[3:]]], "output": [[EVERY[:3]], OUTPUTS]}


def tree_of(vector):
    lead = vector.shape[:-1]
    return {"b": vector[..., :3], "w": vector[..., 3:].reshape(*lead, 4, 6)}


def gradients_of(kind, steps):
    rng = np.random.default_rng(3)
    g = rng.normal(size=(steps, D))
    if kind == "correlated":
        g = 2 * rng.normal(size=D) + g
    if kind == "repeated":
        g[1::2] = g[0::2][: len(g[1::2])]
    if kind == "outlier":
        g[steps // 2] *= 1e3
    if kind == "tiny":
        g *= 1e-12
    return g.astype(np.float32)


def last_direction(tx, gradients, values=None):
    """The last of the directions of a stream, and the state."""
    directions, state = all_directions(tx, gradients, values)
    return jax.tree.map(lambda x: x[-1], directions), state


def all_directions(tx, gradients, values=None):
    """The directions of a stream, and the last state."""
    stacked = tree_of(jnp.asarray(gradients))
    values = jnp.ones(len(gradients)) if values is None else jnp.asarray(values, jnp.float32)

    state, directions = _scanner(tx)(stacked, values)
    return directions, state


@functools.lru_cache
def _scanner(tx):
    @jax.jit
    def run(stacked, values):
        def step(state, each):
            direction, state = tx.update(each[0], state, value=each[1])
            return state, direction

        return lax.scan(step, tx.init(tree_of(jnp.zeros(D))), (stacked, values))

    return run


class Oracle:
    """The direction from dense float64 matrices."""

    def __init__(self, gradients, direction, *, diagonal=None, blocks=None, values=None):
        g = np.asarray(gradients[-M:], np.float64)
        self.n, ages = len(g), np.arange(len(g))[::-1]
        self.d = np.ones(D) if diagonal is None else flat(diagonal)
        a = (ages == 0).astype(float)
        if direction.momentum:
            powers = direction.momentum**ages
            mean = powers / powers.sum()
            nest = direction.momentum if direction.nesterov else 1.0
            a = nest * mean + (1 - nest) * a
        self.out, self.fisher = np.zeros(D), 0.0
        for parts in LEAVES[blocks]:
            self._leaf(parts, g, a, ages, direction, values)
        if direction.limit is not None:
            self.out *= min(1, direction.limit / np.sqrt(self.fisher))
        if not isinstance(direction.length, str):
            self.out *= direction.length / np.sqrt(np.mean(self.out**2))

    def _leaf(self, parts, g, a, ages, direction, values):
        """The blocks of a leaf have one damping and one length."""
        systems = [self._system(part, g, a, ages, direction, values) for part in parts]
        trace = np.mean([np.trace(fisher) for fisher, _ in systems])
        plain = square = form = 0.0
        for part, (fisher, v) in zip(parts, systems, strict=True):
            damped = fisher + LAMBDA * trace * np.eye(len(v))
            values_, vectors = np.linalg.eigh(damped)
            u = vectors @ (values_**-direction.power * (vectors.T @ v))
            self.out[part] = u / np.sqrt(self.d[part])
            plain, square, form = plain + v @ v, square + u @ u, form + u @ damped @ u
        if direction.length == "graft":
            for part in parts:
                self.out[part] *= np.sqrt(plain / square)
            form *= plain / square
        self.fisher += form

    def _system(self, part, g, a, ages, direction, values):
        h = g[:, part] / np.sqrt(self.d[part])
        w, s = np.ones(self.n), np.ones(self.n)
        norms = np.linalg.norm(h, axis=1)
        if direction.weights == UnitNorm():
            s = np.exp(np.log(norms).mean()) / norms
            w = s**2
        elif direction.weights == ByValue():
            s = values[-self.n :] / np.mean(values[-self.n :])
        elif direction.weights is not None:
            w = direction.weights.decay**ages
        return (h.T * w) @ h / self.n, h.T @ (s * a)


DIRECTIONS = {
    "newest": Direction(),
    "momentum": Direction(momentum=0.9),
    "nesterov": Direction(momentum=0.8, nesterov=True),
    "root": Direction(power=0.5, momentum=0.9),
    "graft": Direction(momentum=0.9, length="graft"),
    "rms": Direction(length=0.2),
    "unit": Direction(momentum=0.5, weights=UnitNorm()),
    "age": Direction(weights=ByAge(0.7), length="graft"),
    "value": Direction(momentum=0.5, weights=ByValue()),
    "limit": Direction(momentum=0.9, limit=0.3),
    "limited graft": Direction(momentum=0.9, length="graft", limit=0.1),
}


@pytest.mark.parametrize("blocks", LEAVES)
@pytest.mark.parametrize("metric", [None, Diagonal(DIAGONAL)], ids=["identity", "diagonal"])
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_directions_are_those_of_dense_matrices(direction, metric, blocks):
    tx = mfac_precondition(
        M, relative_damping=LAMBDA, metric=metric, blocks=blocks, direction=direction
    )
    for kind in ("independent", "correlated", "repeated", "outlier", "tiny"):
        g = gradients_of(kind, 2 * M + 2)
        values = np.linspace(1.0, 2.0, len(g))
        found, _ = all_directions(tx, g, values)
        diagonal = DIAGONAL if metric else None
        for i in (1, M - 1, 2 * M + 2):  # while the window fills, and after its ring has turned
            want = Oracle(g[:i], direction, diagonal=diagonal, blocks=blocks, values=values[:i]).out
            # The metric and the damping bound the condition number.
            step = jax.tree.map(lambda x, i=i: x[i - 1], found)
            assert_close(flat(step), want, length=D * M, condition=1e3)


@pytest.mark.parametrize("blocks", LEAVES)
@pytest.mark.jax_defaults
def test_a_large_damping_is_nadamw(blocks):
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 20)
    ours = mfacw(rate, 0.1, window_size=40, relative_damping=1e7, blocks=blocks)
    theirs = optax.nadamw(rate, weight_decay=0.1)
    start = tree_of(jnp.linspace(-1.0, 1.0, D))
    found, expected = start, start
    state, other = ours.init(start), theirs.init(start)
    for g in gradients_of("correlated", 30):
        updates, state = jax.jit(ours.update)(tree_of(jnp.asarray(g)), state, found)
        found = optax.apply_updates(found, updates)
        updates, other = jax.jit(theirs.update)(tree_of(jnp.asarray(g)), other, expected)
        expected = optax.apply_updates(expected, updates)
    # A row keeps the second moments of its step; Adam scales old gradients by the newest ones.
    np.testing.assert_allclose(flat(found), flat(expected), atol=0.1 * 30 * 1e-2)


def test_the_first_step_is_adams():
    tx = mfacw(1e-2, 0.0)
    g = tree_of(jnp.asarray(gradients_of("outlier", 1)[0]))
    updates, _ = tx.update(g, tx.init(g), g)
    np.testing.assert_allclose(flat(updates), -1e-2 * np.sign(flat(g)), rtol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "storage"),
    [
        *itertools.product(LEAVES, [Dense(), Dense(jnp.bfloat16, packing="leaf")]),
        *itertools.product((None, "leaf"), [outside.Half()]),
        *itertools.product((None, "leaf", "output"), [Int8(2), TopK(0.5, error_bits=4)]),
    ],
    ids=lambda x: getattr(x, "packing", type(x).__name__ if x else x),
)
def test_a_bad_gradient_changes_nothing(blocks, storage):
    tx = mfac_precondition(
        M, metric=SecondMoments(), blocks=blocks, direction=DIRECTIONS["unit"], storage=storage
    )
    g = gradients_of("independent", 3)
    _, before = last_direction(tx, g)
    for bad in (np.nan, np.inf, 3e38):
        broken = g[-1].copy()
        broken[5] = bad
        direction, after = jax.jit(tx.update)(tree_of(jnp.asarray(broken)), before, value=1.0)
        assert not flat(direction).any()
        assert after.window.rejected == 1
        same = before._replace(
            count=after.count, window=before.window._replace(rejected=after.window.rejected)
        )
        jax.tree.map(np.testing.assert_array_equal, after, same)


def test_a_leaf_that_its_storage_rejects_is_zero_in_its_window():
    tx = mfac_precondition(M, blocks="leaf", storage=outside.Half())
    g = gradients_of("independent", 3)
    _, state = last_direction(tx, g)
    large = g[-1].copy()
    large[1] = 1e5  # finite, but not in float16
    direction, after = tx.update(tree_of(jnp.asarray(large)), state)
    assert not flat(direction["b"]).any()
    assert flat(direction["w"]).all()
    newest = int(jnp.argmax(after.window.stamps))
    assert not flat(after.window.rows[0].combine(jax.nn.one_hot(newest, M)[None])).any()
    assert not flat(after.window.gram[0, newest]).any()
    np.testing.assert_array_equal(after.window.gram[0, :newest], state.window.gram[0, :newest])


def test_one_outlier_does_not_own_the_window():
    tx = mfac_precondition(M, direction=Direction(momentum=0.9, weights=UnitNorm()))
    plain = mfac_precondition(M, direction=Direction(momentum=0.9))
    g = gradients_of("independent", M)
    usual = np.linalg.norm(flat(last_direction(tx, g)[0]))
    g[2] *= 1e3
    assert np.linalg.norm(flat(last_direction(tx, g)[0])) > usual / 10
    assert np.linalg.norm(flat(last_direction(plain, g)[0])) < usual / 100


@pytest.mark.parametrize("scale", [1e-10, 1e7, 1e15])
def test_unit_norms_do_not_depend_on_the_scale_while_the_window_fills(scale):
    """Empty slots and a zero gradient do not count."""
    tx = mfac_precondition(M, direction=Direction(momentum=0.9, weights=UnitNorm()))
    g = gradients_of("independent", M - 2)
    g[1] = 0
    want = flat(last_direction(tx, g)[0])
    got = flat(last_direction(tx, g * np.float32(scale))[0])
    np.testing.assert_allclose(got * scale, want, rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class OfHeld(Weights):
    """Weights that are NaN, infinite or very large in empty slots."""

    empty: float

    def __call__(self, held):
        weights = jnp.where(held.is_held, 2.0, self.empty)
        return weights, weights


@pytest.mark.parametrize("empty", [np.nan, np.inf, 1e30])
def test_weights_of_empty_slots_do_not_count(empty):
    g = gradients_of("independent", M - 2)
    tx, other = (
        mfac_precondition(M, direction=Direction(momentum=0.9, weights=OfHeld(x)))
        for x in (empty, 2.0)
    )
    got, want = (flat(last_direction(t, g)[0]) for t in (tx, other))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_value_changes_nothing(value):
    tx = mfac_precondition(M, metric=SecondMoments(), direction=Direction(weights=ByValue()))
    g = gradients_of("independent", 3)
    _, before = last_direction(tx, g, np.ones(3))
    direction, after = jax.jit(tx.update)(tree_of(jnp.asarray(g[0])), before, value=value)
    assert not flat(direction).any()
    assert after.window.rejected == 1
    for part in ("metric", "values"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    with pytest.raises(ValueError, match=r"value must be a scalar, got shape \(3,\)"):
        tx.update(tree_of(jnp.asarray(g[0])), before, value=jnp.ones(3))


def test_values_of_both_signs_do_not_lengthen_a_direction():
    tx = mfac_precondition(M, direction=Direction(momentum=0.9, weights=ByValue()))
    g = gradients_of("independent", 4)
    lengths = [
        np.linalg.norm(flat(last_direction(tx, g, np.array(values))[0]))
        for values in ([1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0001])
    ]
    assert lengths[1] < 10 * lengths[0]


@pytest.mark.parametrize("blocks", LEAVES)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_parameters_without_gradients_stay_and_harm_no_other(power, blocks):
    direction = Direction(momentum=0.9, power=power, length="graft", limit=1e-2)
    tx = mfac_precondition(M, metric=SecondMoments(), blocks=blocks, direction=direction)
    g = gradients_of("independent", 4)
    g[:, :3] = 0
    found, _ = last_direction(tx, g)
    assert not flat(found["b"]).any()
    assert np.isfinite(flat(found["w"])).all()
    assert flat(found["w"]).any()


def test_a_zero_gradient_keeps_its_value():
    """A unit without a gradient in one step weighs the values as all others do."""
    tx = mfac_precondition(
        2,
        relative_damping=1e6,
        blocks="output",
        direction=Direction(momentum=0.5, weights=ByValue()),
    )
    params = jnp.zeros((2, 2))
    state = tx.init(params)
    for column, value in ((0.0, 1.0), (1.0, 3.0)):
        gradient = jnp.array([[1.0, column], [1.0, column]])
        step, state = tx.update(gradient, state, value=value)
    # The values weigh 1/2 and 3/2, the ages 1/3 and 2/3.
    first, second = 1 / 2 * 1 / 3 + 3 / 2 * 2 / 3, 3 / 2 * 2 / 3
    np.testing.assert_allclose(step[0, 1] / step[0, 0], second / first, rtol=1e-4)


def test_a_metric_of_ones_own():
    class Twice(Metric):
        def init(self, params):
            return ()

        def update(self, state, gradient):
            return state

        def scale(self, state):
            return tree_of(jnp.full(D, 0.5))

    g = gradients_of("independent", M)
    fours = tree_of(jnp.full(D, 4.0))
    found, _ = last_direction(mfac_precondition(M, metric=Twice()), g)
    want, _ = last_direction(mfac_precondition(M, metric=Diagonal(fours)), g)
    np.testing.assert_allclose(flat(found), flat(want), rtol=1e-6)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Direction(momentum=1.0), ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: Direction(momentum="0.9"), TypeError, "momentum must be a number or a scalar"),
        (lambda: Direction(power=2), ValueError, "power must be 1 or 0.5, got 2"),
        (lambda: Direction(length="long"), ValueError, "length must be one of 'natural', 'graft'"),
        (lambda: Direction(length=0.0), ValueError, "length must be finite and greater than 0"),
        (lambda: Direction(weights=1.0), TypeError, "weights must be Weights or None, got float"),
        (lambda: ByAge(0.0), ValueError, "decay must be finite and greater than 0"),
        (lambda: ByAge(1.5), ValueError, r"decay must lie in \[0, 1\], got 1.5"),
        (lambda: SecondMoments(decay=1.0), ValueError, r"decay must lie in \[0, 1\)"),
        (lambda: SecondMoments(eps=0.0), ValueError, "eps must be finite and greater than 0"),
        (lambda: Diagonal({"b": jnp.arange(3)}), TypeError, "values.*floating-point"),
        (
            lambda: Diagonal({"b": jnp.array([1.0, 0.0])}),
            ValueError,
            r"values\['b'\] must be positive, got 0.0",
        ),
        (
            lambda: Diagonal(jnp.ones(3)).init(tree_of(jnp.zeros(D))),
            ValueError,
            r"values\['b'\] is missing: values has only",
        ),
        (
            lambda: mfac_precondition(blocks=8),
            ValueError,
            r"blocks must be one of 'leaf', 'output', 'output_first'; got 8",
        ),
        (
            lambda: mfac_precondition(metric=0.5),
            TypeError,
            "metric must be Metric or None, got float",
        ),
        (lambda: mfac_precondition(direction=0.9), TypeError, "direction must be Direction"),
        (
            lambda: mfac_precondition(metric=Diagonal({"b": jnp.ones(2), "w": jnp.ones(())})).init(
                tree_of(jnp.zeros(D))
            ),
            ValueError,
            r"values\['b'\] has the wrong shape: expected \(3,\) or \(\), got \(2,\)",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
