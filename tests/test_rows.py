"""Every way of storing rows, and every view of them, answers as a plain matrix would."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import rows
from mfac_jax.rows import GradientRows, PermutedRows, SelectedRows, TransposedRows

M = 4
PARAMS = {
    "a": jnp.zeros((2, 3)),
    "none": None,
    "s": jnp.zeros(()),
    "t": jnp.zeros((2, 2, 3)),
    "z": jnp.zeros((0, 3)),
}
D = 19
STORAGES = ["flat", "per_leaf"]


def leaves_of(vector, shapes):
    """A vector (..., d) in pieces of these shapes, by plain NumPy."""
    lead = np.shape(vector)[:-1]
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = np.split(np.asarray(vector), cuts, axis=-1)
    return tuple(p.reshape((*lead, *shape)) for p, shape in zip(parts, shapes, strict=True))


def tree_of(vector):
    """A vector as a tree like the parameters."""
    a, s, t, z = leaves_of(vector, ((2, 3), (), (2, 2, 3), (0, 3)))
    return {"a": a, "none": None, "s": s, "t": t, "z": z}


def everything(held):
    return SelectedRows.of(held, (True,) * 4)


class View(NamedTuple):
    """A view of stored rows: how it is made, the columns it shows, and its trees."""

    of: Callable[[GradientRows], GradientRows]
    columns: Any = np.arange(D)
    tree: Callable[[Any], Any] = tree_of


PERMUTATION = np.random.default_rng(5).permutation(D)
# `a` turned, and of `t` the last axis first.
TURNED = np.concatenate(
    [
        np.arange(6).reshape(2, 3).T.ravel(),
        [6],
        7 + np.arange(12).reshape(2, 2, 3).transpose(2, 0, 1).ravel(),
    ]
)
TURNS = ((1, 0), (), (2, 0, 1), (1, 0))

VIEWS = {
    "stored": View(lambda held: held),
    "selected": View(
        lambda held: SelectedRows.of(held, (True, False, True, True)),
        np.delete(np.arange(D), 6),
        lambda v: leaves_of(v, ((2, 3), (2, 2, 3), (0, 3))),
    ),
    "transposed": View(
        lambda held: TransposedRows.of(everything(held), TURNS),
        TURNED,
        lambda v: leaves_of(v, ((3, 2), (), (3, 2, 2), (3, 0))),
    ),
    "permuted": View(
        lambda held: PermutedRows.of(held, jnp.asarray(PERMUTATION)), PERMUTATION, np.asarray
    ),
    "permuted, transposed": View(
        lambda held: PermutedRows.of(
            TransposedRows.of(everything(held), TURNS), jnp.asarray(PERMUTATION)
        ),
        TURNED[PERMUTATION],
        np.asarray,
    ),
}
CASES = [
    *((view, storage, "float32") for view in VIEWS for storage in STORAGES),
    *((view, "flat", "bfloat16") for view in VIEWS),
    ("stored", "per_leaf", "bfloat16"),
    ("stored", "flat", "float16"),
    ("stored", "per_leaf", "float16"),
]


@dataclass(frozen=True, eq=False)
class Case:
    """Rows under test, and in float64 the matrix that they stand for."""

    held: GradientRows
    matrix: np.ndarray
    dtype: Any
    tree: Callable[[Any], Any]

    @property
    def d(self):
        return self.matrix.shape[1]

    @property
    def mixing(self):
        return np.tril(np.random.default_rng(2).normal(size=(2, M))).astype(np.float32)

    @functools.cached_property
    def answers(self):
        v = vector(size=self.d)
        arguments = vector(size=M), self.mixing, AT, np.int32(5), np.int32(2)
        gradient = self.tree(vector(3, self.d))
        return answers(self.held, self.tree(v), self.tree(v > 0), gradient, *arguments)


@functools.cache
def made(view, storage, dtype):
    """One for all tests, which may not change it."""
    stored = np.asarray(np.random.default_rng(0).normal(size=(M, D)), jnp.dtype(dtype))
    held = rows.as_rows(jax.tree.map(jnp.asarray, tree_of(stored)), PARAMS, storage=storage)
    matrix = np.asarray(stored, np.float64)[:, VIEWS[view].columns]
    matrix.flags.writeable = False
    return Case(VIEWS[view].of(held), matrix, jnp.dtype(dtype), VIEWS[view].tree)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return made(*request.param)


@pytest.fixture(params=[names for names in CASES if names[2] == "float32"], ids="-".join)
def single(request):
    return made(*request.param)


@pytest.fixture(params=STORAGES)
def storage(request):
    return request.param


def vector(seed=1, size=D):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


AT = np.array([17, 0, 6, 6, 7, 5])
PIECES = [(0, 1), (5, 3), (6, 1), (4, 10), (17, 1)]


def all_columns(held):
    return held.columns(0, held.layout.size)


def with_columns(held):
    return held, all_columns(held)


@jax.jit
def answers(held, v, mask, gradient, c, mixing, at, start, row):
    """Every method in one program."""
    put, dots, accepted = held.put(row, gradient)
    written, also_accepted = held.write(row, gradient)
    return {
        "columns": all_columns(held),
        "pieces": [held.columns(first, size) for first, size in PIECES],
        "traced piece": held.columns(start, 8),
        "take": held.take(at),
        "dots": held.dots(v),
        "combine": held.combine(c),
        "difference": held.combine(c, vector=v, scale=jnp.float32(0.5)),
        "gram": held.gram(),
        "masked gram": held.gram(mask),
        "restrict": all_columns(held.restrict(mask)),
        "transform": with_columns(held.transform(mixing)),
        "transform, lower": with_columns(held.transform(mixing, lower=True)),
        "square sums": held.column_square_sums(),
        "mixed square sums": held.column_square_sums(mixing),
        "mixed square sums, lower": held.column_square_sums(mixing, lower=True),
        "put": (all_columns(put), dots, accepted),
        "write": (all_columns(written), also_accepted),
        "clear": all_columns(held.clear(row)),
    }


def assert_columns(got, matrix):
    """What is only moved is not rounded."""
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got, np.float64), matrix)


def kept(case):
    return vector(size=case.d) > 0


def stored(case, seed):
    """A gradient as the rows keep it."""
    return np.asarray(vector(seed, case.d).astype(case.dtype), np.float64)


def test_they_are_gradient_rows(case):
    assert isinstance(case.held, GradientRows)
    assert case.held.num_rows == M
    assert case.held.dtype == jnp.float32
    assert case.held.layout.size == case.d
    leaves = jax.tree.leaves(case.tree(vector(size=case.d)))
    assert case.held.layout.shapes == tuple(leaf.shape for leaf in leaves)


def test_columns(case):
    got, matrix = case.answers, case.matrix
    assert_columns(got["columns"], matrix)
    pieces = [(first, first + size) for first, size in PIECES]
    for (first, last), piece in zip(pieces, got["pieces"], strict=True):
        assert_columns(piece, matrix[:, first:last])
    assert_columns(got["traced piece"], matrix[:, 5:13])


def test_take(case):
    assert_columns(case.answers["take"], case.matrix[:, AT])


def test_dots(case):
    oracles.assert_close(case.answers["dots"], case.matrix @ vector(size=case.d), length=D)


def test_combine(case):
    got, v, c = case.answers, vector(size=case.d), vector(size=M)
    for name, want in (
        ("combine", c @ case.matrix),
        ("difference", (v - c @ case.matrix) / 2),
    ):
        out = got[name]
        assert jax.tree.structure(out) == jax.tree.structure(case.tree(v))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))
        oracles.assert_close(oracles.flat(out), want, length=M)


def test_gram(case):
    masked = case.matrix * kept(case)
    oracles.assert_close(case.answers["gram"], case.matrix @ case.matrix.T, length=D)
    oracles.assert_close(case.answers["masked gram"], masked @ masked.T, length=D)


def test_restrict(case):
    assert_columns(case.answers["restrict"], case.matrix * kept(case))


def test_transform(case):
    want = case.mixing @ case.matrix
    for name in ("transform", "transform, lower"):
        got, columns = case.answers[name]
        assert isinstance(got, GradientRows)
        assert got.num_rows == 2
        assert got.dtype == jnp.float32
        oracles.assert_close(columns, want, length=M)


def test_column_square_sums(case):
    got, mixing = case.answers, case.mixing
    want = np.sum(case.matrix**2, axis=0)
    oracles.assert_close(oracles.flat(got["square sums"]), want, length=M)
    want = np.sum((mixing @ case.matrix) ** 2, axis=0)
    for name in ("mixed square sums", "mixed square sums, lower"):
        oracles.assert_close(oracles.flat(got[name]), want, length=M)


def test_put_and_write(case):
    new, dots, accepted = case.answers["put"]
    written, also_accepted = case.answers["write"]
    assert accepted
    assert also_accepted
    matrix = case.matrix.copy()
    matrix[2] = stored(case, 3)
    assert_columns(new, matrix)
    assert_columns(written, matrix)
    oracles.assert_close(dots, matrix @ matrix[2], length=D)


@jax.jit
def put(held, row, gradient):
    new, _, accepted = held.put(row, gradient)
    return all_columns(new), accepted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", [6, -1])
def test_put_refuses_what_cannot_be_squared(single, bad, where):
    g = vector(3, single.d)
    g[where] = bad
    columns, accepted = put(single.held, np.int32(1), single.tree(g))
    assert not accepted
    assert_columns(columns, single.matrix)


@pytest.mark.parametrize("storage", STORAGES)
def test_put_refuses_what_overflows_the_storage(storage):
    case = made("stored", storage, "float16")
    columns, accepted = put(case.held, np.int32(1), case.tree(np.full(D, 1e6, np.float32)))
    assert not accepted
    assert_columns(columns, case.matrix)


def test_clear(case):
    matrix = case.matrix.copy()
    matrix[2] = 0
    assert_columns(case.answers["clear"], matrix)


def test_rows_are_pytrees(single):
    same = jax.jit(lambda held: held)(single.held)
    assert jax.tree.structure(same) == jax.tree.structure(single.held)
    assert_columns(all_columns(same), single.matrix)


@pytest.mark.parametrize("chosen", [jnp.float32, jnp.bfloat16])
def test_empty_rows(storage, chosen):
    held = rows.empty_rows(PARAMS, 3, storage=storage, dtype=chosen)
    assert held.num_rows == 3
    assert held.dtype == jnp.float32
    arrays = jax.tree.leaves((held.block,) if storage == "flat" else held.blocks)
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(chosen)}
    np.testing.assert_array_equal(held.gram(), np.zeros((3, 3)))


@pytest.mark.x64
def test_float64_rows(storage):
    matrix = np.random.default_rng(0).normal(size=(M, D))
    held = rows.as_rows(jax.tree.map(jnp.asarray, tree_of(matrix)), PARAMS, storage=storage)
    assert held.dtype == jnp.float64
    np.testing.assert_allclose(held.gram(), matrix @ matrix.T, 1e-13, 1e-13)
    assert rows.empty_rows({"w": jnp.zeros(2)}, 1, storage=storage).dtype == jnp.float64


def test_parameters_without_leaves(storage):
    held = rows.empty_rows({"a": None}, 3, storage=storage)
    assert held.num_rows == 3
    held, dots, accepted = held.put(jnp.int32(0), {"a": None})
    assert accepted
    np.testing.assert_array_equal(dots, np.zeros(3))
    np.testing.assert_array_equal(held.gram(), np.zeros((3, 3)))


def test_as_rows_takes_one_matrix_for_a_tree(storage):
    matrix = made("stored", storage, "float32").matrix
    held = rows.as_rows(jnp.asarray(matrix, jnp.float32), PARAMS, storage=storage)
    np.testing.assert_array_equal(held.columns(0, D), matrix)
    plain = rows.as_rows(jnp.asarray(matrix, jnp.float32), storage=storage)
    assert plain.layout.shapes == ((D,),)


def test_as_rows_keeps_mixed_dtypes(storage):
    tree = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((3, 2), jnp.float32)}
    held = rows.as_rows(tree, storage=storage)
    assert held.dtype == jnp.float32
    assert [d.name for d in held.layout.dtypes] == ["bfloat16", "float32"]
    np.testing.assert_array_equal(held.gram(), np.full((3, 3), 4.0))


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


def test_unknown_storage_and_sizes_are_refused():
    with pytest.raises(ValueError, match="storage must be one of 'flat', 'per_leaf'"):
        rows.as_rows(jnp.ones((2, 3)), storage="disk")
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        rows.empty_rows(PARAMS, 0)
    with pytest.raises(TypeError, match="num_rows must be a Python int, got bool"):
        rows.empty_rows(PARAMS, True)
    for dtype in (jnp.int32, jnp.float16):
        with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float64"):
            rows.empty_rows(PARAMS, 2, dtype=dtype)
