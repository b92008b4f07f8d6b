"""One contract for all rows: they answer as the matrix that they stand for, in float64."""

import functools
import tempfile
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import few_bits
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import outside
import pytest

from mfac_jax import fisher_inverse, rows, window
from mfac_jax.gradients import implicit_rows
from mfac_jax.rows import (
    BlockRun,
    ColumnRows,
    Dense,
    Files,
    GradientRows,
    Int8,
    Paged,
    PagedRows,
    Partition,
    StackedRows,
    Storage,
    TopK,
    WritableRows,
    _base,
    _compressed,
    _int8,
    _pages,
    _storage,
)

M = 4
PARAMS = {
    "a": jnp.zeros((2, 3)),
    "none": None,
    "s": jnp.zeros(()),
    "t": jnp.zeros((2, 2, 3)),
    "z": jnp.zeros((0, 3)),
}
D = 19
SHAPES = ((2, 3), (), (2, 2, 3), (0, 3))


def tree_of(vector):
    """A vector (..., d) as a tree like the parameters, by plain NumPy."""
    lead = np.shape(vector)[:-1]
    cuts = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
    parts = np.split(np.asarray(vector), cuts, axis=-1)
    a, s, t, z = (p.reshape((*lead, *shape)) for p, shape in zip(parts, SHAPES, strict=True))
    return {"a": a, "none": None, "s": s, "t": t, "z": z}


def vector(seed=1, size=D):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def matrix_of(dtype, count=M, seed=0):
    """Gradients that ``dtype`` can hold."""
    return np.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.dtype(dtype))


def held_by(storage, matrix):
    return rows.as_rows(jax.tree.map(jnp.asarray, tree_of(matrix)), PARAMS, storage=storage)


class Made(NamedTuple):
    """Rows, the matrix that they stand for, and one more gradient as they would keep it."""

    held: GradientRows
    matrix: np.ndarray
    stored: Callable[[np.ndarray], np.ndarray]


def rounded_to(dtype):
    return lambda gradient: np.asarray(gradient.astype(jnp.dtype(dtype)), np.float64)


def dense(packing, dtype):
    def make():
        matrix = matrix_of(dtype)
        return Made(held_by(Dense(packing=packing), matrix), matrix, rounded_to(dtype))

    return make


def compressed(storage):
    def make():
        model, matrix = few_bits.Model(storage), matrix_of("float32")
        held = held_by(storage, matrix)
        stored = np.stack([model(gradient) for gradient in matrix])
        return Made(held, stored, lambda gradient: replace(model)(gradient))

    return make


def stacked(*storages):
    def make():
        parts = [matrix_of("float32", count, count) for count in (1, 3)]
        held = [held_by(storage, part) for storage, part in zip(storages, parts, strict=True)]
        matrix = np.concatenate([0.5 * parts[0], 2 * parts[1]])
        held = StackedRows.of(tuple(held), jnp.array([0.5, 2.0]))
        return Made(held, matrix, rounded_to("float32"))

    return make


def from_outside(storage, dtype):
    def make():
        matrix = matrix_of(dtype)
        return Made(held_by(storage, matrix.astype(np.float32)), matrix, rounded_to(dtype))

    return make


def in_tiles(make):
    """Pages of more than 4 columns have several tiles."""

    def tiled():
        with unittest.mock.patch.object(_pages, "MAX_TILE", 4):
            return make()

    return tiled


def loss_of_row(params, batch):
    """The mean of ``tanh(x . w)``, whose gradient is that of ``(1 - tanh^2) x``."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
    terms = [jnp.sum(x * w[None], axis=tuple(range(1, x.ndim))) for w, x in pairs]
    return jnp.mean(jnp.tanh(functools.reduce(jnp.add, terms)))


def implicit(per_example, chunk_size):
    def make():
        weights = 0.1 * vector(11)
        examples = np.random.default_rng(12).normal(size=(5, D)).astype(np.float32)
        # Two batches of one shape and one of another; the first is read again.
        batches = [examples[:2], examples[2:4], examples[4:]]
        gradients = [(1 - np.tanh(x @ weights.astype(float)) ** 2)[:, None] * x for x in batches]
        if per_example:
            matrix = np.concatenate(gradients)[:M]
        else:
            matrix = np.stack([gradients[i].mean(axis=0) for i in (0, 1, 2, 0)])
        held = implicit_rows(
            loss_of_row,
            jax.tree.map(jnp.asarray, tree_of(weights)),
            [jax.tree.map(jnp.asarray, tree_of(batch)) for batch in batches],
            M,
            per_example=per_example,
            chunk_size=chunk_size,
        )
        return Made(held, matrix, rounded_to("float32"))

    return make


MAKERS: dict[str, Callable[[], Made]] = {
    "flat, float32": dense("flat", "float32"),
    "flat, bfloat16": dense("flat", "bfloat16"),
    "flat, float16": dense("flat", "float16"),
    "leaf, float32": dense("leaf", "float32"),
    "leaf, bfloat16": dense("leaf", "bfloat16"),
    "leaf, float16": dense("leaf", "float16"),
    "int8": compressed(Int8(8)),
    "largest": compressed(TopK(0.3, block=8)),
    "largest, 4 bits": compressed(TopK(0.3, block=8, error_bits=4)),
    "largest, float32, no error": compressed(TopK(0.3, values=jnp.float32, error_bits=0)),
    "paged": from_outside(Paged(columns=8), "float32"),
    "paged, bfloat16": from_outside(Paged(columns=7, dtype="bfloat16"), "bfloat16"),
    "paged, tiles": in_tiles(from_outside(Paged(columns=7), "float32")),
    "files": from_outside(Files(tempfile.gettempdir(), columns=8), "float32"),
    "files, bfloat16": from_outside(
        Files(tempfile.gettempdir(), columns=7, dtype="bfloat16"), "bfloat16"
    ),
    "files, tiles": in_tiles(from_outside(Files(tempfile.gettempdir(), columns=7), "float32")),
    "outside": from_outside(outside.Half(), "float16"),
    "implicit, examples": implicit(True, 3),
    "implicit, batches": implicit(False, 2),
    "implicit, one by one": implicit(False, 1),
    "stacked, flat": stacked(Dense(), Dense()),
    "stacked, leaf": stacked(Dense(packing="leaf"), Dense(packing="leaf")),
    "stacked, paged": stacked(Paged(columns=8), Paged(columns=8)),
    "stacked, files": stacked(*[Files(tempfile.gettempdir(), columns=8)] * 2),
    "stacked, mixed": stacked(Dense(), Dense(packing="leaf")),
    "host": from_outside(outside.Host(), "float32"),
    "stacked, host and flat": stacked(outside.Host(), Dense()),
    "stacked, leaf and host": stacked(Dense(packing="leaf"), outside.Host()),
}
WRITABLE = [name for name in MAKERS if not name.startswith(("stacked", "implicit"))]
WITH_COLUMNS = [name for name in MAKERS if not name.startswith("implicit")]
STORAGES: dict[str, Callable[..., Storage]] = {
    "flat": functools.partial(Dense, packing="flat"),
    "leaf": functools.partial(Dense, packing="leaf"),
    "outside": outside.Half,
    "int8": Int8,
    "largest": TopK,
    "paged": Paged,
}
LOSSLESS = ["flat", "leaf", "outside", "paged"]


@dataclass(frozen=True, eq=False)
class Case:
    """Rows under test, and in float64 the matrix that they stand for."""

    held: GradientRows
    matrix: np.ndarray
    stored: Callable[[np.ndarray], np.ndarray]

    @functools.cached_property
    def answers(self):
        v = vector()
        arguments = vector(size=M), MIXING, AT, np.int32(5), np.int32(2)
        ask = jax.jit(answers) if self.held.is_traceable else answers
        trees = jax.tree.map(jnp.asarray, (tree_of(v), tree_of(v > 0), tree_of(vector(3))))
        return ask(self.held, *trees, *map(jnp.asarray, arguments))


@functools.cache
def made(name):
    """One for all tests, which may not change it."""
    held, matrix, stored = MAKERS[name]()
    matrix = matrix.astype(np.float64)
    matrix.flags.writeable = False
    return Case(held, matrix, stored)


@pytest.fixture(params=MAKERS)
def case(request):
    return made(request.param)


@pytest.fixture(params=WITH_COLUMNS)
def readable(request):
    return made(request.param)


@pytest.fixture(params=WRITABLE)
def writable(request):
    return made(request.param)


@pytest.fixture(params=["flat", "leaf"])
def packing(request):
    return request.param


MIXING = np.tril(np.random.default_rng(2).normal(size=(2, M))).astype(np.float32)
AT = np.array([17, 0, 6, 6, 7, 5])
PIECES = [(0, 1), (5, 3), (6, 1), (4, 10), (17, 1)]
KEPT = vector() > 0


def all_columns(held):
    return held.columns(0, held.layout.size)


def answers(held, v, mask, gradient, c, mixing, at, start, row):
    """Every method in one program."""
    found = {
        "dots": held.dots(v),
        "combine": held.combine(c),
        "difference": held.combine(c, vector=v),
        "scaled": held.combine(c, scale=jnp.float32(-2)),
        "scaled difference": held.combine(c, vector=v, scale=jnp.float32(0.5)),
        "gram": held.gram(),
        "masked gram": held.gram(mask),
        "transform": held.transform(mixing),
        "transform, lower": held.transform(mixing, lower=True),
        "square sums": held.column_square_sums(),
        "mixed square sums": held.column_square_sums(mixing),
        "mixed square sums, lower": held.column_square_sums(mixing, lower=True),
        "both": held.both_column_square_sums(mixing),
        "both, lower": held.both_column_square_sums(mixing, lower=True),
    }
    if isinstance(held, ColumnRows):
        found |= {
            "columns": all_columns(held),
            "pieces": [held.columns(first, size) for first, size in PIECES],
            "traced piece": held.columns(start, 8),
            "take": held.take(at),
        }
    if isinstance(held, WritableRows):
        put, dots, accepted = held.put(row, gradient)
        written, also_accepted = held.write(row, gradient)
        found |= {
            "restrict": all_columns(held.restrict(mask)),
            "put": (all_columns(put), dots, accepted),
            "write": (all_columns(written), also_accepted),
            "clear": all_columns(held.clear(row)),
            "clear nothing": all_columns(held.clear(row + M)),
        }
    return found


def assert_columns(got, matrix):
    """What is only moved is not rounded."""
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got, np.float64), matrix)


def test_they_are_gradient_rows(case):
    assert case.held.num_rows == M
    assert case.held.dtype == jnp.float32
    assert case.held.layout == rows.Layout(PARAMS)
    assert _base.check_rows(case.held) is case.held


def test_columns(readable):
    assert _base.check_columns(readable.held, "this test") is readable.held
    got, matrix = readable.answers, readable.matrix
    assert_columns(got["columns"], matrix)
    pieces = [(first, first + size) for first, size in PIECES]
    for (first, last), piece in zip(pieces, got["pieces"], strict=True):
        assert_columns(piece, matrix[:, first:last])
    assert_columns(got["traced piece"], matrix[:, 5:13])


def test_take(readable):
    assert_columns(readable.answers["take"], readable.matrix[:, AT])


def test_dots(case):
    oracles.assert_close(case.answers["dots"], case.matrix @ vector(), length=D)


def test_combine(case):
    v, combined = vector(), vector(size=M) @ case.matrix
    for name, want in (
        ("combine", combined),
        ("difference", v - combined),
        ("scaled", -2 * combined),
        ("scaled difference", (v - combined) / 2),
    ):
        out = case.answers[name]
        assert jax.tree.structure(out) == jax.tree.structure(PARAMS)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))
        oracles.assert_close(oracles.flat(out), want, length=M)


def test_gram(case):
    masked = case.matrix * KEPT
    for name, want in (("gram", case.matrix), ("masked gram", masked)):
        got = case.answers[name]
        oracles.assert_close(got, want @ want.T, length=D)
        np.testing.assert_array_equal(got, got.T)


def test_transform(case):
    for name in ("transform", "transform, lower"):
        got = case.answers[name]
        assert got.num_rows == 2
        assert got.dtype == jnp.float32
        oracles.assert_close(all_columns(got), MIXING @ case.matrix, length=M)


def test_column_square_sums(case):
    got = case.answers
    (own, mixed), (also_own, also_mixed) = got["both"], got["both, lower"]
    want = np.sum(case.matrix**2, axis=0)
    for sums in (got["square sums"], own, also_own):
        oracles.assert_close(oracles.flat(sums), want, length=M)
    want = np.sum((MIXING @ case.matrix) ** 2, axis=0)
    for sums in (got["mixed square sums"], got["mixed square sums, lower"], mixed, also_mixed):
        oracles.assert_close(oracles.flat(sums), want, length=M)


def test_rows_that_jit_can_trace_are_pytrees(case):
    if not case.held.is_traceable:
        assert not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(case.held))
        return
    nodes = jax.tree.leaves(case.held, is_leaf=lambda node: isinstance(node, rows.Layout))
    assert case.held.layout in [node for node in nodes if isinstance(node, rows.Layout)]
    same = jax.jit(lambda held: held)(case.held)
    assert jax.tree.structure(same) == jax.tree.structure(case.held)
    for leaf, other in zip(jax.tree.leaves(same), jax.tree.leaves(case.held), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_restrict(writable):
    assert_columns(writable.answers["restrict"], writable.matrix * KEPT)


def test_put_and_write(writable):
    assert _base.check_writable(writable.held, "this test") is writable.held
    new, dots, accepted = writable.answers["put"]
    written, also_accepted = writable.answers["write"]
    assert accepted
    assert also_accepted
    matrix = writable.matrix.copy()
    matrix[2] = writable.stored(vector(3))
    assert_columns(new, matrix)
    assert_columns(written, matrix)
    oracles.assert_close(dots, matrix @ matrix[2], length=D)


def put_and_write(held, row, gradient):
    ask = jax.jit(_put_and_write) if held.is_traceable else _put_and_write
    return ask(held, row, gradient)


def _put_and_write(held, row, gradient):
    new, _, accepted = held.put(row, gradient)
    written, also_accepted = held.write(row, gradient)
    return (all_columns(new), accepted), (all_columns(written), also_accepted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", [6, -1])
def test_what_cannot_be_squared_is_rejected(writable, bad, where):
    g = vector(3)
    g[where] = bad
    for columns, accepted in put_and_write(writable.held, jnp.int32(1), tree_of(g)):
        assert not accepted
        assert_columns(columns, writable.matrix)


@pytest.mark.parametrize("name", ["flat, float16", "leaf, float16", "outside"])
def test_what_overflows_the_storage_is_rejected(name):
    case = made(name)
    g = tree_of(np.full(D, 1e6, np.float32))
    for columns, accepted in put_and_write(case.held, jnp.int32(1), g):
        assert not accepted
        assert_columns(columns, case.matrix)


@pytest.mark.x64
@pytest.mark.parametrize("storage", [rows.Int8(tile=4), rows.TopK(0.5, block=4)])
@pytest.mark.parametrize("by_output", [False, True])
def test_what_overflows_a_scale_or_a_value_is_rejected(storage, by_output):
    g = jnp.full((2, 4), 1e40)
    if by_output:
        held, dots = storage.by_output(g, 3, 0).put(jnp.int32(1), g, jnp.bool_(True))
        assert not dots.any()
        assert not held.combine(jnp.ones((held.num_blocks, 3))).any()
    else:
        held, accepted = storage.empty(g, 3).write(jnp.int32(1), g)
        assert not accepted
        assert not held.combine(jnp.ones(3)).any()


def test_clear(writable):
    matrix = writable.matrix.copy()
    matrix[2] = 0
    assert_columns(writable.answers["clear"], matrix)
    assert_columns(writable.answers["clear nothing"], writable.matrix)


@pytest.mark.parametrize("jit", [False, True])
def test_write_rows(writable, jit):
    """Some of the gradients, of which one is rejected."""
    held = writable.held
    if held.is_traceable:
        held = jax.tree.map(jnp.copy, held)  # the rows are donated
    elif jit:
        pytest.skip("jit cannot trace these rows")
    else:
        held = held.clear(jnp.int32(M))  # a copy
    new = np.stack([vector(seed) for seed in (3, 4, 5)])
    new[1, 7] = np.nan

    def write(held, gradients):
        return held.write_rows(1, gradients, 2)

    got, accepted = (jax.jit(write) if jit else write)(
        held, jax.tree.map(jnp.asarray, tree_of(new))
    )
    np.testing.assert_array_equal(accepted[:2], [True, False])
    matrix = writable.matrix.copy()
    matrix[1] = writable.stored(vector(3))
    assert_columns(all_columns(got), matrix)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (9, 9), (7, 2), (8, 3), (5, 4), (20, 2)])
def test_tiles_in_rounds(count, batch, in_place):
    """One round, a short last one, and more than a program states one after another."""
    sizes = []

    def function(a, b):
        sizes.append(len(a))
        return jnp.sum(a, axis=1) * b

    a, b = jnp.arange(3.0 * count).reshape(count, 3), jnp.arange(2.0, count + 2)
    got = _compressed.map_tiles(function, batch, a, b, in_place=in_place)
    np.testing.assert_array_equal(got, a.sum(axis=1) * b)
    assert max(sizes) <= batch


@pytest.mark.parametrize("storage", [Int8(4), TopK(0.5, block=4)], ids=["int8", "largest"])
def test_compressed_rows_that_are_read_in_pieces(storage, monkeypatch):
    """As rows of many parameters are; the last piece is a short one."""
    for module in (_compressed, _int8):
        monkeypatch.setattr(module, "_ENTRIES_AT_A_TIME", 2 * 4 * M)
    rng = np.random.default_rng(0)
    g, v, c, keep = (rng.normal(size=shape).astype(np.float32) for shape in ((M, 27), 27, M, 27))
    held = rows.as_rows(jnp.asarray(g), storage=storage)
    model = few_bits.Model(storage)
    matrix = np.stack([model(gradient) for gradient in g])
    assert_columns(held.columns(0, 27), matrix)
    oracles.assert_close(held.dots(jnp.asarray(v)), matrix @ v, length=27)
    oracles.assert_close(held.combine(jnp.asarray(c)), c @ matrix, length=M)
    oracles.assert_close(held.gram(), matrix @ matrix.T, length=27)
    masked = matrix * (keep > 0)
    oracles.assert_close(held.gram(jnp.asarray(keep > 0)), masked @ masked.T, length=27)
    oracles.assert_close(
        all_columns(held.transform(jnp.asarray(MIXING))), MIXING @ matrix, length=M
    )


# Blocks.


@dataclass(frozen=True)
class Product:
    """``G_b^T G_b v_b`` in blocks where a mask is true; sums of it; and where it is positive."""

    what: str

    def __call__(self, batch, part, here, factor):
        assert batch.shape == (part.shape[0], M, part.shape[1])
        assert here.shape == part.shape
        assert here.dtype == bool
        kept = jnp.where(here[:, None], batch, jnp.zeros_like(batch))
        dots = jnp.einsum("bnj,bj->bn", kept, part, precision="highest")
        found = factor * jnp.einsum("bnj,bn->bj", kept, dots, precision="highest")
        sums = jnp.sum(found, axis=1)
        results = {"coordinates": found, "blocks": sums, "all": (found, sums, here & (part > 0))}
        return results[self.what]


RUNS = {
    "ones": (BlockRun(0, D, 1),),
    "one": (BlockRun(0, 1, D),),
    "several": (BlockRun(0, 3, 4), BlockRun(12, 1, 2), BlockRun(14, 1, 5)),
    "gaps": (BlockRun(1, 2, 3), BlockRun(8, 1, 1), BlockRun(10, 1, 6)),
    "none": (),
}
PERMUTATION = np.random.default_rng(5).permutation(D).astype(np.int32)
ORDERS = {
    "as they are": None,
    "permuted": PERMUTATION,
    "partial": PERMUTATION[:16],
}
FACTOR = np.float32(-1.5)


def products_of_blocks(case, runs, order, what):
    places = ORDERS[order]
    partition = Partition(None if places is None else jnp.asarray(places), RUNS[runs])
    return case.held.map_blocks(
        partition,
        Product(what),
        tree_of(vector()),
        tree_of(vector(7) > 0),
        constants=(jnp.asarray(FACTOR),),
    )


PARTITIONS = [(runs, order) for runs in RUNS for order in ORDERS if order != "partial"]
PARTITIONS += [(runs, "partial") for runs in ("gaps", "none")]


@pytest.mark.parametrize(("runs", "order"), PARTITIONS)
def test_map_blocks(readable, runs, order):
    places = ORDERS[order]
    got = products_of_blocks(readable, runs, order, "all")
    keep = vector(7) > 0
    kept, whole, sums = readable.matrix * keep, np.zeros(D), []
    positive = np.zeros(D, bool)
    for run in RUNS[runs]:
        for i in range(run.count):
            here = np.arange(run.start + i * run.size, run.start + (i + 1) * run.size)
            here = here if places is None else places[here]
            whole[here] = FACTOR * (kept[:, here].T @ (kept[:, here] @ vector()[here]))
            positive[here] = keep[here] & (vector()[here] > 0)
            sums.append(whole[here].sum())
    size = np.abs(kept.T @ kept) @ np.abs(vector())
    coordinates, blocks, where = got
    for out in (coordinates, where):
        assert jax.tree.structure(out) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(oracles.flat(coordinates), whole, rtol=0, atol=1e-5 * size.max())
    assert blocks.shape == (len(sums),)
    np.testing.assert_allclose(blocks, sums, rtol=0, atol=1e-5 * size.sum())
    assert {leaf.dtype for leaf in jax.tree.leaves(where)} == {jnp.dtype(bool)}
    np.testing.assert_array_equal(oracles.flat(where), positive)


@pytest.mark.parametrize("name", ["flat, float32", "stacked, mixed", "outside", "host"])
def test_a_result_of_blocks_need_not_be_in_a_tuple(name):
    case = made(name)
    coordinates, blocks, _ = products_of_blocks(case, "gaps", "permuted", "all")
    alone = products_of_blocks(case, "gaps", "permuted", "coordinates")
    jax.tree.map(np.testing.assert_array_equal, alone, coordinates)
    alone = products_of_blocks(case, "gaps", "permuted", "blocks")
    np.testing.assert_array_equal(alone, blocks)


@pytest.mark.parametrize("name", ["flat, float32", "leaf, bfloat16", "stacked, mixed", "host"])
def test_results_by_run(name):
    """Each as the function returns it, of any shape; of blocks that are neighbours only."""
    case = made(name)

    def grams(batch, factor):
        return {"gram": factor * jnp.einsum("bni,bnj->bij", batch, batch), "first": batch[:, 0]}

    options = {"constants": (jnp.float32(2),), "by_run": True}
    found = case.held.map_blocks(Partition(None, RUNS["gaps"]), grams, **options)
    assert len(found) == len(RUNS["gaps"])
    for got, run in zip(found, RUNS["gaps"], strict=True):
        here = case.matrix[:, run.start : run.start + run.width]
        blocks = np.moveaxis(here.reshape(M, run.count, run.size), 1, 0)
        np.testing.assert_array_equal(got["first"], blocks[:, 0])
        np.testing.assert_allclose(got["gram"], 2 * np.einsum("bni,bnj->bij", blocks, blocks), 1e-4)
    assert case.held.map_blocks(Partition(None, ()), grams, **options) == ()
    with pytest.raises(ValueError, match="by_run needs blocks of consecutive coordinates"):
        case.held.map_blocks(Partition(jnp.asarray(PERMUTATION), RUNS["one"]), grams, **options)


def test_another_order_compiles_nothing():
    held, traced = made("flat, float32").held, []

    def count(batch):
        traced.append(batch.shape)
        return jnp.sum(batch, axis=1)

    for seed in range(3):
        order = jnp.asarray(np.random.default_rng(seed).permutation(D), jnp.int32)
        held.map_blocks(Partition(order, RUNS["several"]), count)
    once = len(traced)
    held.map_blocks(Partition(jnp.arange(D, dtype=jnp.int32), RUNS["several"]), count)
    assert len(traced) == once


# Storages.


@pytest.mark.parametrize("name", STORAGES)
def test_empty_rows(name):
    held = STORAGES[name]().empty(PARAMS, 3)
    assert isinstance(held, WritableRows)
    assert held.num_rows == 3
    assert held.layout == rows.Layout(PARAMS)
    np.testing.assert_array_equal(all_columns(held), np.zeros((3, D)))


def test_a_storage_is_one_static_value():
    """Rows made twice by one storage are of one structure, as a loop needs it."""
    for make in STORAGES.values():
        storage = make()
        hash(storage)
        first, second = (storage.empty(PARAMS, 2) for _ in range(2))
        assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("chosen", [None, jnp.float32, jnp.bfloat16])
def test_dense_rows_are_stored_in_the_dtype_asked_for(packing, chosen):
    storage = Dense(chosen, packing)
    want = jnp.dtype(chosen or jnp.float32)
    filled = rows.as_rows(jnp.ones((3, D)), PARAMS, storage=storage)
    for held in (storage.empty(PARAMS, 3), filled):
        assert held.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(held.blocks)} == {want}


@pytest.mark.x64
def test_float64_rows(packing):
    storage = Dense(packing=packing)
    matrix = np.random.default_rng(0).normal(size=(M, D))
    held = held_by(storage, matrix)
    assert held.dtype == jnp.float64
    np.testing.assert_allclose(held.gram(), matrix @ matrix.T, 1e-13, 1e-13)
    assert storage.empty({"w": jnp.zeros(2)}, 1).dtype == jnp.float64


@pytest.mark.parametrize("name", STORAGES)
def test_parameters_without_leaves(name):
    held = STORAGES[name]().empty({"a": None}, 3)
    assert held.num_rows == 3
    held, dots, accepted = held.put(jnp.int32(0), {"a": None})
    assert accepted
    np.testing.assert_array_equal(dots, np.zeros(3))
    np.testing.assert_array_equal(held.gram(), np.zeros((3, 3)))
    np.testing.assert_array_equal(held.gram({"a": None}), np.zeros((3, 3)))
    assert held.column_square_sums() == {"a": None}


@pytest.mark.parametrize("name", LOSSLESS)
def test_as_rows_takes_one_matrix_for_a_tree(name):
    matrix = made("flat, float16").matrix
    held = rows.as_rows(jnp.asarray(matrix, jnp.float32), PARAMS, storage=STORAGES[name]())
    np.testing.assert_array_equal(held.columns(0, D), matrix)
    plain = rows.as_rows(jnp.asarray(matrix, jnp.float32), storage=STORAGES[name]())
    assert plain.layout.shapes == ((D,),)


def test_as_rows_keeps_mixed_dtypes(packing):
    tree = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((3, 2), jnp.float32)}
    held = rows.as_rows(tree, storage=Dense(packing=packing))
    assert held.dtype == jnp.float32
    assert [d.name for d in held.layout.dtypes] == ["bfloat16", "float32"]
    np.testing.assert_array_equal(held.gram(), np.full((3, 3), 4.0))


def test_a_storage_that_writes_says_which_gradient_it_rejects():
    bad = jnp.ones((3, D)).at[1, 4].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="row 1 of gradients has NaN or Inf in it"):
        rows.as_rows(bad, PARAMS, storage=outside.Half())


def test_a_storage_whose_rows_cannot_be_written_says_so():
    class Empty(Storage):
        def empty(self, params, num_rows):
            return StackedRows.of((Dense().empty(params, num_rows),), jnp.ones(1))

    with pytest.raises(TypeError, match=r"default hold of Empty needs rows .* got StackedRows"):
        rows.as_rows(jnp.ones((3, D)), PARAMS, storage=Empty())


def test_a_storage_outside_counts_what_its_rows_are_asked():
    storage = outside.Half()
    held = rows.as_rows(jnp.ones((3, D)), PARAMS, storage=storage)
    assert not storage.reads.of
    inverse = fisher_inverse(held, 1.0)
    assert storage.reads.of == {"gram": 1}
    inverse.ihvp(PARAMS)
    inverse.ihvp(PARAMS)
    assert storage.reads.of == {"gram": 1, "dots": 2, "combine": 2}


@pytest.mark.parametrize(
    ("gradients", "params", "error", "message"),
    [
        ({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}, None, ValueError, "one leading axis"),
        ({"a": jnp.ones(())}, None, ValueError, "one leading axis"),
        ({"a": jnp.ones((0, 2))}, None, ValueError, "one leading axis"),
        ({}, None, ValueError, "one leading axis"),
        ({"a": jnp.ones((3, 2), jnp.int32)}, None, TypeError, "real floating-point"),
        ({"a": jnp.ones((3, 2), jnp.complex64)}, None, TypeError, "real floating-point"),
        ({"a": jnp.ones((3, 2))}, {"a": jnp.ones((1, 2))}, ValueError, r"\[1, 2\].*\[2\]"),
        ({"a": jnp.ones((3, 2))}, {"b": jnp.ones(2)}, ValueError, "'b'.*'a'"),
        (jnp.ones((3, 5)), {"b": jnp.ones(2)}, ValueError, r"\[2\].*\[5\]"),
    ],
)
def test_as_rows_refuses(gradients, params, error, message):
    with pytest.raises(error, match=message):
        rows.as_rows(gradients, params)


@pytest.mark.wrong_types
def test_a_density_of_numpy_or_jax_is_a_number():
    assert hash(TopK(np.float32(0.5))) == hash(TopK(jnp.float32(0.5))) == hash(TopK(0.5))


def test_impossible_storages_are_refused():
    with pytest.raises(ValueError, match="packing must be one of 'flat', 'leaf'; got 'disk'"):
        Dense(packing="disk")
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        Dense().empty(PARAMS, 0)
    with pytest.raises(TypeError, match="num_rows must be a Python int, got bool"):
        Dense().empty(PARAMS, True)
    for dtype in (jnp.int32, jnp.float16):
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float64"):
            Dense(dtype)
    with pytest.raises(ValueError, match="float64 needs jax_enable_x64"):
        Dense(jnp.float64)
    for make in (Int8, lambda size: TopK(block=size)):
        for size in (1, 24, 2**16):
            with pytest.raises(ValueError, match=f"a power of two from 2 to 32768, got {size}"):
                make(size)
    for density in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="density must"):
            TopK(density)
    with pytest.raises(ValueError, match="values must be one of bfloat16, float32; got int8"):
        TopK(values=jnp.int8)
    with pytest.raises(ValueError, match="error_bits must be 0, 4 or 16, got 8"):
        TopK(error_bits=8)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("flat", r"such as mfac_jax.rows.Dense\(packing=\"flat\"\), got 'flat'"),
        ("per_leaf", r"such as mfac_jax.rows.Dense\(packing=\"leaf\"\), got 'per_leaf'"),
        ("disk", r"such as mfac_jax.rows.Dense\(dtype, packing\), got 'disk'"),
        (Dense, r"storage must be a storage, .* got <class .*Dense'>"),
        (None, "storage must be a storage, .* got None"),
    ],
)
def test_what_is_no_storage_is_refused(storage, message):
    with pytest.raises(TypeError, match=message):
        rows.as_rows(jnp.ones((2, 3)), storage=storage)
    with pytest.raises(TypeError, match=message):
        _storage.check_storage(storage)


# Capabilities.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Products(GradientRows):
    """Rows that answer products and nothing else."""

    matrix: Any
    layout: rows.Layout
    num_rows: int = field(metadata={"static": True})
    dtype = jnp.dtype("float32")

    def dots(self, vector):
        flat = self.layout.flatten(vector, self.dtype, "vector")
        return jnp.matmul(self.matrix, flat, precision="highest")

    def combine(self, coefficients, *, vector=None, scale=None):
        out = jnp.matmul(coefficients, self.matrix, precision="highest")
        if vector is not None:
            out = self.layout.flatten(vector, self.dtype, "vector") - out
        return self.layout.unflatten(out if scale is None else scale * out)

    def gram(self, mask=None):
        g = self.matrix
        g = g if mask is None else jnp.where(self.layout.flat_mask(mask)[None], g, 0.0)
        return jnp.matmul(g, g.T, precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written(Products, WritableRows):
    """Rows that answer products and can be written."""

    def write(self, row, gradient):
        new = self.layout.flatten(gradient, self.dtype, "gradient")
        accepted = rows.is_small_enough(new @ new, self.num_rows)
        matrix = jnp.where(accepted, self.matrix.at[row].set(new), self.matrix)
        return replace(self, matrix=matrix), accepted

    def put(self, row, gradient):
        new, accepted = self.write(row, gradient)
        return new, new.matrix @ new.matrix[row], accepted

    def clear(self, row):
        return replace(self, matrix=self.matrix.at[row].set(0))

    def restrict(self, mask):
        return replace(self, matrix=jnp.where(self.layout.flat_mask(mask)[None], self.matrix, 0.0))


@dataclass(frozen=True)
class Writing(Storage):
    def empty(self, params, num_rows):
        layout = rows.Layout(params)
        return Written(jnp.zeros((num_rows, layout.size)), layout, num_rows)


LAM = 0.3


def products():
    matrix = matrix_of("float32")
    return Products(jnp.asarray(matrix), rows.Layout(PARAMS), M), matrix


@pytest.mark.parametrize("masked", [False, True])
def test_products_are_enough_for_the_whole_inverse(masked):
    held, matrix = products()
    keep = KEPT if masked else np.ones(D, bool)
    inverse = fisher_inverse(held, LAM, mask=tree_of(KEPT) if masked else None)
    g, v = matrix * keep, vector()
    dense = oracles.inverse(g, LAM)
    condition = oracles.condition(g, LAM) * oracles.cancellation(v, dense @ v, LAM)
    close = {"length": D, "condition": condition}
    oracles.assert_close(oracles.flat(inverse.ihvp(tree_of(v))), dense @ v, **close)
    c = vector(size=M)
    got = inverse.combination(jnp.asarray(c))
    oracles.assert_close(oracles.flat(got), dense @ g.T @ c, **close)
    oracles.assert_close(inverse.quadratic_form(tree_of(v)), v @ dense @ v, **close)
    oracles.assert_close(inverse.log_det(), oracles.log_det(dense), **close)
    oracles.assert_close(oracles.flat(inverse.diagonal()), np.diag(dense), **close)
    draw = inverse.sample(jax.random.key(0))
    same = fisher_inverse(held_by(Dense(), matrix), LAM, mask=inverse.mask)
    want = oracles.flat(same.sample(jax.random.key(0)))
    oracles.assert_close(oracles.flat(draw), want, **close)


def test_products_are_enough_to_transform_and_to_whiten():
    held, matrix = products()
    oracles.assert_close(
        all_columns(held.transform(jnp.asarray(MIXING))), MIXING @ matrix, length=M
    )
    inverse = fisher_inverse(held, LAM).whiten()
    condition = oracles.condition(matrix, LAM)
    lower = np.linalg.cholesky(M * LAM * np.eye(M) + matrix.astype(np.float64) @ matrix.T)
    want = np.linalg.solve(lower, matrix)
    oracles.assert_close(all_columns(inverse.whitened), want, length=D, condition=condition)


def test_products_and_writing_are_enough_for_a_window():
    params, v = jax.tree.map(jnp.asarray, PARAMS), tree_of(vector())
    found = []
    for storage in (Writing(), Dense()):
        held = window.init(params, M, storage=storage)
        for seed in range(M + 2):
            held, info = window.push(held, tree_of(vector(seed)))
            assert info.accepted
        held = window.restrict(window.remove(held, 1), tree_of(KEPT))
        found.append((window.ihvp(held, v, LAM), window.ihvp_newest(held, LAM)))
    for got, want in zip(*found, strict=True):
        oracles.assert_close(oracles.flat(got), oracles.flat(want), length=D)


@pytest.mark.wrong_types
def test_parts_of_a_stack_that_do_not_fit_are_refused():
    held, other = made("flat, float32").held, rows.as_rows(jnp.ones((2, 3)))
    for parts, scales in (((held, held), jnp.ones(3)), ((), jnp.ones(0))):
        with pytest.raises(ValueError, match="one part and one scale for each part, got"):
            StackedRows.of(parts, scales)
    with pytest.raises(ValueError, match=r"the same parameters: expected .*'a'.*, got .*\[3\]"):
        StackedRows.of((held, other), jnp.ones(2))
    with pytest.raises(TypeError, match="must be gradient rows"):
        StackedRows.of((held, jnp.ones((2, 3))), jnp.ones(2))


@pytest.mark.parametrize("packing", ["flat", "leaf"])
def test_parts_of_a_stack_may_be_of_other_dtypes(packing):
    g = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32)
    low = jnp.asarray(g[:2], jnp.bfloat16)  # for parameters in bfloat16
    parts = rows.as_rows(low, storage=Dense(packing=packing)), rows.as_rows(jnp.asarray(g[2:]))
    matrix = np.concatenate([np.asarray(low, np.float64), 2 * np.asarray(g[2:], np.float64)])
    held = StackedRows.of(parts, jnp.array([1.0, 2.0]))
    v, c = vector(size=5), jnp.asarray(vector(size=4))
    assert held.dtype == jnp.float32
    oracles.assert_close(held.dots(v), matrix @ v, length=5)
    oracles.assert_close(
        held.combine(c, vector=v, scale=jnp.float32(2)), 2 * (v - np.asarray(c) @ matrix), length=4
    )
    oracles.assert_close(held.gram(jnp.asarray(v > 0)), (matrix * (v > 0)) @ matrix.T, length=5)


def test_vectors_of_blocks_must_fit():
    held = rows.as_rows(jnp.ones((2, 4)))
    blocks = rows.partition(held.layout, 2)
    with pytest.raises(
        ValueError, match=r"vectors has the wrong shape: expected \(4,\), got \(8,\)"
    ):
        held.map_blocks(blocks, max, jnp.ones(8))
    with pytest.raises(ValueError, match=r"vectors has the wrong shape: expected \(4,\)"):
        held.map_blocks(blocks, max, jnp.ones(3, bool))


def test_the_implementation_of_a_stack_is_that_of_its_parts():
    plain, best = (held_by(Dense(implementation=i), matrix_of("float32")) for i in ("xla", None))
    for parts, want in (((plain, plain), "xla"), ((best, best), None), ((plain, best), None)):
        assert StackedRows.of(parts, jnp.ones(2)).implementation == want


NO_COLUMNS = r"needs rows whose columns can be read \(mfac_jax.rows.ColumnRows\), got Products"
NO_WRITING = r"needs rows that can be written \(mfac_jax.rows.WritableRows\), got Products"


@pytest.mark.wrong_types
def test_what_needs_more_than_products_says_so():
    held, _ = products()
    inverse = fisher_inverse(held, LAM)
    with pytest.raises(TypeError, match=f"entries {NO_COLUMNS}, which cannot"):
        inverse.entries(0, 0)
    for blocks in (4, "leaf"):
        with pytest.raises(TypeError, match=rf"blocks={blocks!r}, n=4, d=19 {NO_COLUMNS}"):
            fisher_inverse(held, LAM, blocks=blocks)
    stack = StackedRows.of((held, held), jnp.ones(2))
    with pytest.raises(TypeError, match=f"the columns of stacked rows {NO_COLUMNS}"):
        stack.take(jnp.arange(3))
    with pytest.raises(TypeError, match=f"a window {NO_WRITING}"):
        window.from_rows(held)
    for check in (_base.check_columns, _base.check_writable):
        with pytest.raises(TypeError, match=r"rows must be gradient rows .* got ndarray"):
            check(np.ones((2, 3)), "this test")


@pytest.mark.wrong_types
def test_partitions_that_do_not_fit_are_refused():
    held = held_by(Dense(), matrix_of("float32"))
    order = jnp.arange(3)
    for blocks, error, message in (
        ("leaf", TypeError, "partition must be a Partition, .* got str"),
        (Partition(None, (BlockRun(0, 1, D + 1),)), ValueError, f"block that ends at {D + 1}"),
        (Partition(order, (BlockRun(0, 2, 2),)), ValueError, "ends at 4 and an order of 3"),
        (Partition(jnp.zeros(D + 1, int), ()), ValueError, f"an order of {D + 1} of {D}"),
    ):
        with pytest.raises(error, match=message):
            held.map_blocks(blocks, max)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"columns": 0}, ValueError, "columns must be at least 1, got 0"),
        ({"columns": 2.0}, TypeError, "columns must be a Python int, got float"),
        ({"columns": 20}, ValueError, "at most the number of columns of the gradients, 19; got 20"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float32"),
    ],
)
def test_pages_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        Paged(**options).empty(PARAMS, M)


def test_pages_take_64_mib_by_default():
    like = jax.ShapeDtypeStruct((25_557_032,), jnp.float32)
    pages = jax.eval_shape(lambda: Paged().empty(like, 1024)).pages
    assert pages.shape == (1560, 2, 1024, 8192)
    pages = jax.eval_shape(lambda: Paged(dtype="bfloat16").empty(like, 1024)).pages
    assert pages.shape == (780, 4, 1024, 8192)


def test_columns_of_a_page_are_whole_tiles():
    like = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    for columns, shape in ((8192, (13, 1, 2, 8192)), (10_000, (10, 2, 2, 5000))):
        pages = jax.eval_shape(lambda: Paged(columns).empty(like, 2)).pages  # noqa: B023
        assert pages.shape == shape


def test_the_inverse_of_pages():
    """Whole pages and a last one that is not full give the inverse of the same gradients."""
    g = matrix_of("float32", 6)
    want, got = (
        fisher_inverse(held_by(storage, g), 0.1) for storage in (Dense(), Paged(columns=4))
    )
    v, zero = tree_of(vector()), jnp.int32(0)
    for ask in (
        lambda inverse: inverse.ihvp(v),
        lambda inverse: inverse.diagonal(),
        lambda inverse: inverse.whiten().diagonal(),
        lambda inverse: inverse.log_det(),
        lambda inverse: inverse.entries(zero, zero),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ask(got), ask(want)
        )
    assert isinstance(got.whiten().whitened, PagedRows)
