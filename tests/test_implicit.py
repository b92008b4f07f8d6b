"""Rows that are not stored: those of collect_gradients, at the cost in time that is promised."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import collect_gradients, fisher_inverse, pruning, rows
from mfac_jax.gradients import implicit_rows
from mfac_jax.inverse._inverse import whole_inverse

WIDTH, HIDDEN, CLASSES = 4, 5, 3


def logits(params, x):
    hidden = jnp.tanh(jnp.matmul(x, params["in"], precision="highest") + params["bias"][None])
    return jnp.matmul(hidden, params["out"], precision="highest")


def loss(params, batch):
    x, y = batch
    log_p = jax.nn.log_softmax(logits(params, x))
    return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))


def sample_labels(params, batch, key):
    return batch[0], jax.random.categorical(key, logits(params, batch[0])).astype(jnp.int32)


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"in": (WIDTH, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN, CLASSES)}
    normal = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: jnp.asarray(leaf, dtype) for name, leaf in normal.items()} | {"frozen": None}


def make_batches(*lengths):
    rng = np.random.default_rng(1)
    return [
        (
            rng.normal(size=(n, WIDTH)).astype(np.float32),
            rng.integers(CLASSES, size=n, dtype=np.int32),
        )
        for n in lengths
    ]


def normal_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def matrix_of(held):
    return np.asarray(held.columns(0, held.layout.size), np.float64)


BATCHES = make_batches(5, 5, 2)
COLLECTED = [
    # per example, number of rows, rows of one pass over the data, gradients at a time
    (False, None, 3, 1),
    (False, 8, 8, 3),
    (True, None, 12, 5),
    (True, 29, 29, 4),
]


@pytest.mark.parametrize(("per_example", "num_gradients", "count", "chunk_size"), COLLECTED)
def test_they_are_the_rows_that_are_collected(per_example, num_gradients, count, chunk_size):
    params, options = make_params(), {"per_example": per_example}
    held = implicit_rows(loss, params, BATCHES, num_gradients, chunk_size=chunk_size, **options)
    assert held.num_rows == count
    want = matrix_of(collect_gradients(loss, params, BATCHES, count, progress=False, **options))
    got = held.transform(jnp.eye(count))
    np.testing.assert_allclose(matrix_of(got), want, rtol=1e-5, atol=1e-6)
    v = normal_like(params, 2)
    keep = jax.tree.map(lambda x: x > 0, v)
    oracles.assert_close(held.dots(v), want @ oracles.flat(v), length=want.shape[1])
    masked = want * oracles.flat(keep)
    oracles.assert_close(held.gram(keep), masked @ masked.T, length=want.shape[1])
    c = np.random.default_rng(3).normal(size=count).astype(np.float32)
    oracles.assert_close(oracles.flat(held.combine(jnp.asarray(c))), c @ want, length=count)


@pytest.mark.parametrize("per_example", [False, True])
def test_labels_are_drawn_as_those_of_collected_rows(per_example):
    options = {"per_example": per_example, "sample_labels": sample_labels, "key": jax.random.key(3)}
    batches = [(x, None) for x, _ in BATCHES]
    held = implicit_rows(loss, make_params(), batches, 14, **options)
    want = collect_gradients(loss, make_params(), batches, 14, progress=False, **options)
    got = held.transform(jnp.eye(14))
    np.testing.assert_allclose(matrix_of(got), matrix_of(want), rtol=1e-5, atol=1e-6)


def test_an_iterator_that_fills_one_buffer_is_read_once():
    def batches():
        buffer = np.empty((2, WIDTH), np.float32)
        for i in range(3):
            buffer[...] = i
            yield buffer, np.zeros(2, np.int32)

    held = implicit_rows(loss, make_params(), batches())
    assert [batch[0][0, 0, 0] for _, batch in held.pieces] == [0, 1, 2]


@pytest.mark.x64
def test_float64():
    params = make_params(np.float64)
    batches = [(x.astype(np.float64), y) for x, y in BATCHES]
    held = implicit_rows(loss, params, batches, 4, chunk_size=3)
    assert held.dtype == jnp.float64
    want = np.stack([oracles.flat(jax.grad(loss)(params, batches[i])) for i in (0, 1, 2, 0)])
    v = normal_like(params, 2)
    np.testing.assert_allclose(held.gram(), want @ want.T, rtol=1e-12)
    np.testing.assert_allclose(held.dots(v), want @ oracles.flat(v), rtol=1e-12)
    got = fisher_inverse(held, 0.1).ihvp(v)
    np.testing.assert_allclose(
        oracles.flat(got), oracles.inverse(want, 0.1) @ oracles.flat(v), rtol=1e-11
    )


def test_parameters_of_low_precision():
    params, batches = make_params(jnp.bfloat16), [(x.astype(jnp.bfloat16), y) for x, y in BATCHES]
    held = implicit_rows(loss, params, batches, per_example=True, chunk_size=5)
    assert held.dtype == jnp.float32
    want = matrix_of(collect_gradients(loss, params, batches, 12, per_example=True, progress=False))
    v = normal_like(params, 2)
    for got, exact in (
        (held.dots(v), want @ oracles.flat(v)),
        (oracles.flat(held.combine(jnp.ones(12))), want.sum(axis=0)),
        (held.gram(), want @ want.T),
    ):
        oracles.assert_close(got, exact, length=1, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(held.combine(jnp.ones(12)))} == {held.dtype}


# The inverse.

N, D, LAM = 6, 26, 0.01


def linear(params, batch):
    """The gradients are the means of the batches."""
    return jnp.mean(jnp.sum(batch * params[None], axis=1))


def rows_of(g, *, per_example, **options):
    batches = [g] if per_example else [np.stack([row, row]) for row in g]
    return implicit_rows(linear, jnp.zeros(D), batches, per_example=per_example, **options)


def answers(held, v, c, keep, masked):
    inverse = fisher_inverse(held, LAM, mask=keep if masked else None)
    return {
        "ihvp": inverse.ihvp(v),
        "combination": inverse.combination(c),
        "compensate": inverse.compensate(jnp.where(keep, jnp.zeros_like(v), v)),
        "quadratic": inverse.quadratic_form(v),
        "log_det": inverse.log_det(),
        "diagonal": inverse.diagonal(),
        "sample": inverse.sample(jax.random.key(0)),
        "whitened diagonal": inverse.whiten().diagonal(),
    }


KINDS = ["independent", "ill-conditioned", "duplicated"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_is_that_of_the_dense_matrix(kind, per_example, masked):
    g = oracles.gradients(kind, N, D)
    rng = np.random.default_rng(4)
    v, c = rng.normal(size=D).astype(np.float32), rng.normal(size=N).astype(np.float32)
    keep = np.arange(D) % 3 > 0
    held = rows_of(g, per_example=per_example, chunk_size=4)
    got = answers(held, v, c, keep, masked)
    same = answers(rows.as_rows(jnp.asarray(g)), v, c, keep, masked)
    g = g * (keep if masked else 1.0)
    dense, condition = oracles.inverse(g, LAM), oracles.condition(g, LAM)
    close = {"length": D, "condition": condition}
    loose = close | {"condition": condition * oracles.cancellation(v, dense @ v, LAM)}
    oracles.assert_close(got["ihvp"], dense @ v, **loose)
    oracles.assert_close(got["combination"], oracles.ihvp_combination(g, c, LAM), **close)
    oracles.assert_close(got["quadratic"], v @ dense @ v, **loose)
    oracles.assert_close(got["log_det"], oracles.log_det(dense), **close)
    for name in ("diagonal", "whitened diagonal"):
        oracles.assert_close(got[name], np.diag(dense), **close)
    for name in ("compensate", "sample"):
        oracles.assert_close(got[name], same[name], **loose)


def test_memory_does_not_grow_with_the_number_of_gradients():
    """The most that is alive as a batch is differentiated, in vectors of the parameters."""
    d, most = 2**16, []

    def one_of(params, batch):
        jax.debug.callback(lambda: most.append(sum(x.nbytes for x in jax.live_arrays())))
        return jnp.sum(params * batch.reshape(1)) ** 2

    def vectors(function, *arguments):
        before = sum(x.nbytes for x in jax.live_arrays())
        most.clear()
        jax.block_until_ready(function(*arguments))
        jax.effects_barrier()
        return (max(most) - before) / (4 * d)

    params, v = jnp.ones(d) / d, jnp.ones(d)
    for m in (16, 64):
        batches = [np.full((1, 1), i / m, np.float32) for i in range(m)]
        held = implicit_rows(one_of, params, batches, chunk_size=4)
        assert vectors(held.gram) < 2 * 4 + 2
        assert vectors(held.column_square_sums, jnp.eye(m)) < 3 * 4 + 3
        cut = rows.partition(held.layout, None)
        inverse = whole_inverse(held, None, jnp.float32(0.1), cut, jnp.eye(m))
        assert vectors(inverse.ihvp, v) < 4


def test_every_product_costs_what_is_promised():
    """The number of losses that are differentiated, with rows of mini-batches."""
    calls = []

    def counted(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        return linear(params, batch)

    def cost_of(function, *arguments):
        calls.clear()
        jax.block_until_ready(function(*arguments))
        jax.effects_barrier()
        return len(calls)

    g = oracles.gradients("independent", N, D)
    for chunk_size in (1, 2, N):
        batches = list(g[:, None])
        held = implicit_rows(counted, jnp.zeros(D), batches, chunk_size=chunk_size)
        of_gram = N**2 // (2 * chunk_size) + N // 2
        assert cost_of(held.dots, jnp.zeros(D)) == N
        assert cost_of(held.combine, jnp.ones(N)) == N
        assert cost_of(held.transform, jnp.eye(N)) == N
        assert cost_of(held.gram) == of_gram
        inverse = fisher_inverse(held, LAM)
        assert cost_of(inverse.ihvp, jnp.zeros(D)) == 2 * N
        assert cost_of(inverse.diagonal) == of_gram + N


@pytest.mark.parametrize(("score", "update"), [("magnitude", "joint"), ("obd", "none")])
def test_pruning_with_gradients_that_are_not_stored(score, update):
    params = make_params()
    options = {"damping": LAM, "score": score, "update": update}
    held = implicit_rows(loss, params, BATCHES, per_example=True)
    stored = collect_gradients(loss, params, BATCHES, 12, per_example=True, progress=False)
    got, want = (
        pruning.prune_step(params, pruning.initial_mask(params), given, 0.5, **options)
        for given in (held, stored)
    )
    jax.tree.map(np.testing.assert_array_equal, got[1], want[1])
    oracles.assert_close(oracles.flat(got[0]), oracles.flat(want[0]), length=12, condition=1e3)


# What is wrong with the data or the loss.


@pytest.mark.parametrize("per_example", [False, True])
def test_a_gradient_that_is_not_finite_is_named(per_example):
    batches = make_batches(2, 3, 2)
    batches[1][0][1, 2] = np.nan
    held = implicit_rows(loss, make_params(), batches, per_example=per_example, chunk_size=2)
    finite = np.isfinite(held.dots(normal_like(make_params(), 0)))
    assert list(np.flatnonzero(~finite)) == [3 if per_example else 1]
    where = "row 3 .*of batch 1, example 1" if per_example else "row 1 .*of batch 1"
    for ask in (lambda: fisher_inverse(held, LAM), held.column_square_sums):
        with pytest.raises(FloatingPointError, match=where):
            ask()


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function, got int"),
        ({"loss_fn": lambda p, b: b[0]}, ValueError, r"must return a scalar, .* got shape \(5, 4"),
        ({"loss_fn": lambda p, b: jnp.sum(b[1])}, TypeError, "real floating-point number, got int"),
        ({"batches": BATCHES[0][0]}, TypeError, "a single batch is given as"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": [(np.ones((2, 3)), np.ones(3))]}, ValueError, "batch 0 must be a tree of"),
        ({"params": {"w": jnp.arange(3)}}, TypeError, "must be a real floating-point array"),
        ({"num_gradients": 0}, ValueError, "num_gradients must be at least 1, got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"per_example": 1}, TypeError, "per_example must be bool, got int"),
        ({"key": jax.random.key(0)}, ValueError, "key is for sample_labels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"loss_fn": loss, "params": make_params(), "batches": BATCHES} | change
    with pytest.raises(error, match=message):
        implicit_rows(**arguments)


def test_what_needs_columns_or_writing_says_so():
    held = rows_of(oracles.gradients("independent", N, D), per_example=True)
    inverse, anything = fisher_inverse(held, LAM), pruning.Scope(path_filter="")
    for ask in (
        lambda: inverse.entries(0, 1),
        lambda: fisher_inverse(held, LAM, blocks=4),
        lambda: pruning.prune_step(
            jnp.ones(D), jnp.ones(D, bool), held, 0.5, damping=LAM, score="mfac", scope=anything
        ),
    ):
        with pytest.raises(TypeError, match=r"columns can be read .* got ImplicitRows"):
            ask()
