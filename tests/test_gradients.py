"""Rows against gradients computed one by one, and every way the data can be odd."""

import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from flax import nnx
from oracles import flat, relative_error

from mfac_jax import collect_gradients
from mfac_jax._collect import _gradients, chunk_size_of
from mfac_jax.rows import Dense, Layout, StackedRows, Storage, WritableRows, _base

CLASSES, FEATURES = 3, 4
D = CLASSES * FEATURES + CLASSES

STORAGES = {"flat": Dense(), "leaf": Dense(packing="leaf")}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


def logits(params, x):
    return x @ params["w"] + params["b"][None]


def loss(params, batch):
    x, y = batch
    log_p = jax.nn.log_softmax(logits(params, x))
    return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))


def sample_labels(params, batch, key):
    return batch[0], jax.random.categorical(key, logits(params, batch[0]))


def make_params(dtype=jnp.float32):
    w = jax.random.normal(jax.random.key(0), (FEATURES, CLASSES), dtype)
    return {"w": w, "b": jnp.zeros(CLASSES, dtype), "frozen": None}


def make_batches(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(n, FEATURES)).astype("float32"),
            rng.integers(CLASSES, size=n, dtype="int32"),
        )
        for n in lengths
    ]


def matrix(rows):
    """The rows as one (m, d) array, whatever their storage."""
    return np.asarray(rows.columns(0, rows.layout.size))


def one_by_one(params, batches, num_gradients, per_example, loss_fn=loss):
    """The same rows from single calls of jax.grad."""
    if per_example:
        batches = [
            jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
            for batch in batches
            for i in range(len(jax.tree.leaves(batch)[0]))
        ]
    batches = itertools.islice(itertools.cycle(batches), num_gradients)
    gradients = [jax.grad(loss_fn)(params, batch) for batch in batches]
    return np.stack([flat(gradient) for gradient in gradients])


def assert_rows_close(got, expected):
    # Both are float32 sums of at most a few dozen terms of order one.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def collect(*args, **kwargs):
    return collect_gradients(*args, progress=False, **kwargs)


@pytest.mark.parametrize(("num_gradients", "storage"), [(1, "flat"), (3, "leaf"), (8, "flat")])
def test_mini_batch_rows(num_gradients, storage):
    params, batches = make_params(), make_batches(5, 5, 2)
    rows = collect(loss, params, batches, num_gradients, storage=STORAGES[storage])
    assert rows.num_rows == num_gradients
    assert_rows_close(matrix(rows), one_by_one(params, batches, num_gradients, False))


# 12 examples: fewer, exactly as many, and more than twice as many; chunks of one, of a
# size that divides nothing, and larger than a batch.
@pytest.mark.parametrize(
    ("num_gradients", "chunk_size", "storage"),
    [
        (1, None, "flat"),
        (8, 3, "leaf"),
        (12, 1, "flat"),
        (12, 7, "leaf"),
        (29, 3, "flat"),
        (29, None, "leaf"),
    ],
)
def test_per_example_rows(num_gradients, chunk_size, storage):
    params, batches = make_params(), make_batches(5, 5, 2)
    rows = collect(
        loss,
        params,
        batches,
        num_gradients,
        per_example=True,
        chunk_size=chunk_size,
        storage=STORAGES[storage],
    )
    assert_rows_close(matrix(rows), one_by_one(params, batches, num_gradients, True))


class HostRows(WritableRows):
    """Rows in host memory, which no compiled program can take; they can be written, no more."""

    dtype = jnp.dtype("float32")
    dots = combine = gram = put = write = clear = restrict = None

    def __init__(self, layout, num_rows):
        self.layout, self.num_rows = layout, num_rows
        self.matrix = np.zeros((num_rows, layout.size), "float32")

    def write_rows(self, first, gradients, count):
        leaves = [np.asarray(g).reshape(len(g), -1) for g in jax.tree.leaves(gradients)]
        new = np.concatenate(leaves, axis=1)[:count]
        self.matrix[first : first + count] = new
        return self, jnp.asarray(np.isfinite(new).all(axis=1))


class Host(Storage):
    def empty(self, params, num_rows):
        return HostRows(Layout(params), num_rows)


@pytest.mark.parametrize("per_example", [False, True])
def test_rows_in_host_memory_are_written_one_by_one(per_example):
    params, batches = make_params(), make_batches(5, 5, 2)
    options = {"per_example": per_example, "storage": outside.Host()}
    held = collect(loss, params, batches, 14, **options)
    assert_rows_close(held.matrix, one_by_one(params, batches, 14, per_example))


@pytest.mark.parametrize("per_example", [False, True])
def test_rows_that_can_only_be_written(per_example):
    params, batches = make_params(), make_batches(5, 5, 2)
    options = {"per_example": per_example, "storage": Host()}
    rows = collect(loss, params, batches, 14, **options)
    assert_rows_close(rows.matrix, one_by_one(params, batches, 14, per_example))
    batches[1][0][1, 0] = np.nan
    with pytest.raises(FloatingPointError, match="row 6 .*example 1" if per_example else "row 1 "):
        collect(loss, params, batches, 14, **options)


@pytest.mark.wrong_types
def test_rows_that_cannot_be_written_are_an_error():
    class ReadOnly(Host):
        def empty(self, params, num_rows):
            return StackedRows.of((Dense().empty(params, num_rows),), jnp.ones(1))

    with pytest.raises(TypeError, match=r"collecting gradients with .* got StackedRows"):
        collect(loss, make_params(), make_batches(4), 2, storage=ReadOnly())


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("num_gradients", [1, 7, 13])
def test_no_row_is_left_empty(num_gradients, per_example):
    rows = collect(loss, make_params(), make_batches(4, 3), num_gradients, per_example=per_example)
    assert np.all(np.linalg.norm(matrix(rows), axis=1) > 0)


def test_mini_batch_gradient_is_the_mean_of_its_examples():
    params, batches = make_params(), make_batches(6)
    mean = matrix(collect(loss, params, batches, 6, per_example=True)).mean(axis=0)
    assert_rows_close(matrix(collect(loss, params, batches, 1))[0], mean)


def test_an_example_arrives_as_a_batch_of_one():
    lengths = []

    def recording(params, batch):
        lengths.append(len(batch[0]))
        return loss(params, batch)

    collect(recording, make_params(), make_batches(5), 5, per_example=True)
    assert set(lengths) == {1}


@pytest.mark.parametrize("per_example", [False, True])
def test_generators_are_cycled_like_lists(per_example):
    params, batches = make_params(), make_batches(5, 5, 2)
    expected = matrix(collect(loss, params, batches, 30, per_example=per_example))
    rows = collect(loss, params, (batch for batch in batches), 30, per_example=per_example)
    np.testing.assert_array_equal(matrix(rows), expected)


def test_a_generator_may_reuse_its_buffer():
    params, batches = make_params(), make_batches(4, 4, 4)

    def refill() -> Iterator[Any]:
        x, y = np.empty((4, FEATURES), "float32"), np.empty(4, "int32")
        for new_x, new_y in batches:
            x[:], y[:] = new_x, new_y
            yield x, y
        x[:], y[:] = 1e9, 0

    np.testing.assert_array_equal(
        matrix(collect(loss, params, refill(), 7)), matrix(collect(loss, params, batches, 7))
    )


def test_an_endless_generator_is_read_only_as_far_as_needed():
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield make_batches(4, seed=i)[0]

    collect(loss, make_params(), endless(), 9, per_example=True)
    assert taken == [0, 1, 2]


def test_a_loader_is_iterated_afresh_and_not_kept():
    batches = make_batches(4, 4)

    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(batches)

    loader = Loader()
    rows = collect(loss, make_params(), loader, 5)
    assert loader.passes == 3
    assert_rows_close(matrix(rows), one_by_one(make_params(), batches, 5, False))


def test_an_object_that_cannot_start_afresh_is_an_error():
    class Spent:
        def __init__(self):
            self.iterator = iter(make_batches(4, 4))

        def __iter__(self):
            return self.iterator

    with pytest.raises(ValueError, match="gave nothing when iterated over again"):
        collect(loss, make_params(), Spent(), 5)


@every_storage
@pytest.mark.parametrize(
    ("per_example", "num_gradients", "where"),
    [(True, 30, "row 9 .*batch 1, example 3"), (False, 30, r"row 1 .*batch 1\) must")],
)
def test_a_row_that_is_not_finite_is_named(per_example, num_gradients, where, storage):
    batches = make_batches(6, 6, 6)
    batches[1][0][3, 0] = np.nan
    with pytest.raises(FloatingPointError, match=where):
        collect(
            loss, make_params(), batches, num_gradients, per_example=per_example, storage=storage
        )


def test_a_row_that_is_not_finite_is_found_early_and_late():
    produced = []

    def data(bad):
        for i in range(200):
            produced.append(i)
            ((x, y),) = make_batches(2, seed=i)
            yield (x * np.float32(np.inf), y) if i == bad else (x, y)

    with pytest.raises(FloatingPointError, match="row 3 "):
        collect(loss, make_params(), data(3), 200)
    assert len(produced) < 20
    with pytest.raises(FloatingPointError, match="row 199 "):
        collect(loss, make_params(), data(199), 200)


def test_a_row_too_large_to_square_is_an_error():
    def steep(params, batch):
        return 1e25 * jnp.sum(params) * jnp.mean(batch)

    with pytest.raises(FloatingPointError, match="too large to square"):
        collect(steep, jnp.zeros(3), [np.ones(2, "float32")], 1)


def test_nan_in_an_example_that_is_not_used_does_no_harm():
    batches = make_batches(6)
    batches[0][0][5] = np.nan
    rows = collect(loss, make_params(), batches, 5, per_example=True, chunk_size=3)
    assert np.all(np.isfinite(matrix(rows)))


def test_the_callers_arrays_are_left_alone():
    params = make_params()
    batches = [jax.tree.map(jnp.asarray, batch) for batch in make_batches(4, 4)]
    key, mask = jax.random.key(0), jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    mine = (params, batches, key, mask)
    before = jax.tree.map(np.array, (params, batches, jax.random.key_data(key), mask))
    for per_example in (False, True):
        collect(
            loss,
            params,
            batches,
            5,
            per_example=per_example,
            sample_labels=sample_labels,
            key=key,
            mask=mask,
        )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(mine))
    after = (params, batches, jax.random.key_data(key), mask)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_numpy_data_are_left_alone():
    params = jax.tree.map(np.asarray, make_params())
    batches = make_batches(4, 4)
    before = jax.tree.map(np.copy, (params, batches))
    collect(loss, params, batches, 5, per_example=True)
    jax.tree.map(np.testing.assert_array_equal, before, (params, batches))


@every_storage
@pytest.mark.parametrize("per_example", [False, True])
def test_one_compilation_for_each_length_of_batch(per_example, storage):
    traces = []

    def counted(params, batch):
        traces.append(len(batch[0]))
        return loss(params, batch)

    def compilations(batches, num_gradients):
        """Of the program that computes gradients, and of the one that writes them."""
        traces.clear()
        before = _gradients._cache_size(), _base._write_rows._cache_size()
        options = {"chunk_size": 4} if per_example else {}
        options |= {"per_example": per_example, "storage": storage}
        collect(counted, params, batches, num_gradients, **options)
        return _gradients._cache_size() - before[0], _base._write_rows._cache_size() - before[1]

    params = make_params()
    _base._write_rows.clear_cache()
    # The last chunk is smaller, in the batch and in the number of rows.
    assert compilations(make_batches(*[6] * 20), 33) == (1, 1)
    assert len(traces) == 1
    assert compilations(make_batches(6, 6, seed=1), 33) == (0, 0)
    assert not traces
    assert compilations(make_batches(6, 5, seed=1), 33) == (1, 0)


@every_storage
def test_rows_are_written_in_place(storage):
    # Nothing as large as the rows is allocated beside them.
    params, count, row_bytes = make_params(), 4000, 4 * D
    rows = storage.empty(params, count)
    gradients = jax.tree.map(lambda p: jnp.zeros((8, *p.shape)), params)
    memory = _base._write_rows.lower(rows, 0, gradients, 8).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= count * row_bytes
    assert memory.temp_size_in_bytes < count * row_bytes / 10
    held = jax.tree.leaves(rows)
    rows.write_rows(0, gradients, 8)
    assert all(leaf.is_deleted() for leaf in held)


@pytest.mark.parametrize(("d", "expected"), [(10, 128), (2**20, 16), (2**25, 1), (0, 128)])
def test_the_default_chunk_holds_64_mib_of_gradients(d, expected):
    assert chunk_size_of(None, True, d, 1000) == expected


def test_bfloat16_parameters_give_float32_rows():
    params = make_params(jnp.bfloat16)
    batches = [(x.astype(jnp.bfloat16), y) for x, y in make_batches(4, 4)]
    rows = collect(loss, params, batches, 2)
    assert matrix(rows).dtype == np.float32
    np.testing.assert_allclose(
        matrix(rows), one_by_one(params, batches, 2, False), rtol=2e-2, atol=1e-2
    )
    low = collect(loss, params, batches, 2, storage=Dense(jnp.bfloat16))
    assert low.blocks.dtype == jnp.bfloat16


@pytest.mark.x64
def test_float64_parameters_give_float64_rows():
    params = make_params(jnp.float64)
    batches = [(x.astype("float64"), y) for x, y in make_batches(4, 4)]
    assert collect(loss, params, batches, 2, per_example=True).blocks.dtype == jnp.float64


def test_a_mask_restricts_the_rows():
    params, batches = make_params(), make_batches(4, 4)
    mask = {"w": np.arange(FEATURES * CLASSES).reshape(FEATURES, CLASSES) % 2 == 0, "b": True}
    mask["frozen"] = None
    full = collect(loss, params, batches, 5, per_example=True)
    restricted = collect(loss, params, batches, 5, per_example=True, mask=mask)
    np.testing.assert_array_equal(matrix(restricted), matrix(full.restrict(mask)))
    assert np.any(matrix(restricted) != matrix(full))


def test_a_masked_weight_may_have_an_infinite_gradient():
    def cusp(params, batch):
        return jnp.mean(batch) * jnp.sum(jnp.sqrt(params))

    mask = np.array([True, False])
    rows = collect(cusp, jnp.array([1.0, 0.0]), [np.ones(2, "float32")], 2, mask=mask)
    np.testing.assert_allclose(matrix(rows), [[0.5, 0.0], [0.5, 0.0]])


def test_nnx_state_as_parameters():
    model = nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)

    def nnx_loss(state, batch):
        x, y = batch
        log_p = jax.nn.log_softmax(nnx.merge(graph, state)(x))
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))

    batches = make_batches(4, 4)
    for storage in STORAGES.values():
        rows = collect(nnx_loss, state, batches, 7, per_example=True, storage=storage)
        assert_rows_close(matrix(rows), one_by_one(state, batches, 7, True, nnx_loss))


def test_sharded_parameters_and_batches():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params, batches = make_params(), make_batches(4, 4)
    spread = {**params, "w": jax.device_put(params["w"], sharding)}
    spread_batches = [jax.device_put(batch, sharding) for batch in batches]
    for per_example in (False, True):
        rows = collect(
            loss, spread, spread_batches, 6, per_example=per_example, storage=STORAGES["leaf"]
        )
        assert_rows_close(matrix(rows), one_by_one(params, batches, 6, per_example))


def exact_fisher(params, x):
    """``mean_x E_{y ~ model} grad grad^T`` of the softmax regression, in float64."""
    x = np.asarray(x, "float64")
    z = np.asarray(logits(params, x), "float64")
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    fisher = np.zeros((D, D))
    for features, probabilities in zip(x, p, strict=True):
        for label, probability in enumerate(probabilities):
            error = probabilities - np.eye(CLASSES)[label]
            # Leaves in the order of the tree: b, then w.
            gradient = np.concatenate([error, np.outer(features, error).ravel()])
            fisher += probability * np.outer(gradient, gradient) / len(x)
    return fisher


def second_moment(rows):
    g = matrix(rows).astype("float64")
    return g.T @ g / len(g)


def test_monte_carlo_fisher_is_the_true_fisher_in_expectation():
    params = make_params()
    ((x, y),) = make_batches(16)
    exact = exact_fisher(params, x)
    n = 16 * 1024
    drawn = collect(
        loss,
        params,
        [(x, y)],
        n,
        per_example=True,
        sample_labels=sample_labels,
        key=jax.random.key(1),
    )
    # The error of a mean of n independent draws is about |F| sqrt(D / n) = 0.03 |F|.
    assert relative_error(second_moment(drawn), exact) < 0.06
    empirical = collect(loss, params, [(x, y)], 16, per_example=True)
    assert relative_error(second_moment(empirical), exact) > 0.2


def test_monte_carlo_fisher_of_mini_batches_is_smaller_by_their_length():
    params = make_params()
    ((x, y),) = make_batches(16)
    drawn = collect(
        loss, params, [(x, y)], 4096, sample_labels=sample_labels, key=jax.random.key(1)
    )
    assert relative_error(16 * second_moment(drawn), exact_fisher(params, x)) < 0.12


def test_labels_depend_on_the_key_and_the_row_and_nothing_else():
    params, batches = make_params(), make_batches(8, 8)

    def draw(seed, chunk_size):
        rows = collect(
            loss,
            params,
            batches,
            48,
            per_example=True,
            chunk_size=chunk_size,
            sample_labels=sample_labels,
            key=jax.random.key(seed),
        )
        return matrix(rows)

    first = draw(0, 3)
    assert_rows_close(draw(0, 8), first)
    assert np.any(draw(1, 3) != first)
    # The data come around after 16 rows, with labels of their own.
    assert np.any(first[:16] != first[16:32])


def test_data_without_labels_serve_the_true_fisher():
    rows = collect(
        loss,
        make_params(),
        [x for x, _ in make_batches(4, 4)],
        3,
        sample_labels=lambda p, x, key: (x, jax.random.categorical(key, logits(p, x))),
        key=jax.random.PRNGKey(0),
    )
    assert np.all(np.linalg.norm(matrix(rows), axis=1) > 0)


def test_no_derivative_is_taken_of_the_sampler():
    def squared(params, batch):
        x, y = batch
        return jnp.mean((x @ params - y) ** 2)

    def gaussian(params, x, key):
        return x, x @ params + jax.random.normal(key, x.shape[:1])

    x = np.eye(3, dtype="float32")
    rows = collect(squared, jnp.ones(3), [x], 1, sample_labels=gaussian, key=jax.random.key(0))
    # Were y differentiated too, the residual would not depend on the parameters.
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (3,))
    np.testing.assert_allclose(matrix(rows)[0], -2 / 3 * noise, rtol=1e-4, atol=1e-6)


GOOD = {"loss_fn": loss, "params": make_params(), "batches": make_batches(4), "num_gradients": 2}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function, got int"),
        ({"loss_fn": lambda p, b: b[0][:, 0]}, ValueError, r"scalar, .* got shape \(4,\)"),
        ({"loss_fn": lambda p, b: (loss(p, b), {})}, TypeError, "scalar and nothing else"),
        (
            {"loss_fn": lambda p, b: jnp.sum(b[1])},
            TypeError,
            "real floating-point number, got int32",
        ),
        ({"loss_fn": lambda p, b: None}, TypeError, "scalar and nothing else"),
        ({"params": {"w": jnp.arange(3)}}, TypeError, r"params\['w'\] .* got int32\[3\]"),
        ({"params": {"w": jnp.ones(3, jnp.complex64)}}, TypeError, r"params\['w'\].*complex64"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter(())}, ValueError, "batches is empty"),
        ({"batches": 3}, TypeError, "batches must be an iterable of batches, got int"),
        ({"batches": [()]}, ValueError, "batch 0 must be a tree of arrays"),
        (
            {"batches": [(np.ones((4, 4)), np.ones(3))]},
            ValueError,
            r"batch 0 .* same length >= 1, got shapes {'\[0\]': \(4, 4\), '\[1\]': \(3,\)}",
        ),
        ({"batches": [(np.ones((0, 4)), np.ones(0))]}, ValueError, "length >= 1"),
        ({"batches": [(np.ones((4, 4)), 1.0)]}, ValueError, "one leading axis"),
        ({"batches": {"x": np.ones(4)}}, ValueError, "batch 0 must be a tree of arrays"),
        ({"num_gradients": 0}, ValueError, "num_gradients must be at least 1, got 0"),
        ({"num_gradients": 2.0}, TypeError, "num_gradients must be a Python int, got float"),
        ({"num_gradients": True}, TypeError, "num_gradients must be a Python int, got bool"),
        ({"per_example": 1}, TypeError, "per_example must be a bool, got int"),
        ({"chunk_size": 4}, ValueError, "chunk_size is for per_example=True, got chunk_size=4"),
        (
            {"chunk_size": 0, "per_example": True},
            ValueError,
            "chunk_size must be at least 1, got 0",
        ),
        ({"sample_labels": sample_labels}, ValueError, "sample_labels needs a key"),
        ({"sample_labels": 1, "key": jax.random.key(0)}, TypeError, "sample_labels must be a fun"),
        ({"sample_labels": sample_labels, "key": 0}, TypeError, "JAX random key, .* got int"),
        ({"key": jax.random.key(0)}, ValueError, "key is for sample_labels"),
        ({"storage": "sparse"}, TypeError, "storage must be a storage, .* got 'sparse'"),
        ({"mask": {"w": True}}, ValueError, "mask does not have the structure"),
        (
            {"mask": {"w": 1.0, "b": True, "frozen": None}},
            TypeError,
            r"mask\['w'\] must be boolean",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    # Without the type checker of the tests, which would speak first.
    plain = inspect.unwrap(collect_gradients)
    with pytest.raises(error, match=message):
        plain(**{**GOOD, "progress": False, **changes})


def test_a_function_that_cannot_be_hashed_is_an_error():
    class Unhashable:
        __hash__ = None

        def __call__(self, params, batch):
            return loss(params, batch)

    with pytest.raises(TypeError, match="loss_fn must be hashable"):
        collect(Unhashable(), make_params(), make_batches(4), 2)


@pytest.mark.wrong_types
def test_the_arguments_are_checked_before_the_data_are_touched():
    def untouchable():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(TypeError, match="storage"):
        collect(loss, make_params(), untouchable(), 2, storage="sparse")
    with pytest.raises(ValueError, match="mask"):
        collect(loss, make_params(), untouchable(), 2, mask=True)


def test_the_progress_bar_counts_every_row_and_can_be_turned_off(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    arguments = (loss, make_params(), make_batches(4, 4), 23)
    collect_gradients(*arguments)
    assert "23/23" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    collect_gradients(*arguments, progress=False)
    assert capsys.readouterr().err == ""


def test_the_progress_bar_is_silent_without_a_terminal(capsys):
    collect_gradients(loss, make_params(), make_batches(4, 4), 23)
    assert capsys.readouterr().err == ""
