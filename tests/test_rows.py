"""Both ways of storing rows answer alike, and as a plain matrix would."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from mfac_jax import rows
from mfac_jax.rows import GradientRows

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
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def tree_of(vector, dtype=jnp.float32):
    """The vector as a tree like the parameters, by plain NumPy."""
    vector = np.asarray(vector)
    out, start = {}, 0
    for name, leaf in PARAMS.items():
        if leaf is None:
            out[name] = None
            continue
        part = vector[..., start : start + leaf.size]
        out[name] = jnp.asarray(part.reshape(vector.shape[:-1] + leaf.shape), dtype)
        start += leaf.size
    return out


def stacked(tree, m=M):
    """The leaves (m, *shape) of a tree as one float64 matrix."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(x, np.float64).reshape(m, -1) for x in leaves], axis=1)


def make(storage, dtype=jnp.float32, seed=0):
    """Rows, and the matrix that they hold, in float64."""
    tree = tree_of(np.random.default_rng(seed).normal(size=(M, D)), dtype)
    return rows.as_rows(tree, PARAMS, storage=storage), stacked(tree)


@pytest.fixture(params=STORAGES)
def storage(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def dtype(request):
    return request.param


def vector(seed=1, size=D):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def test_they_are_gradient_rows(storage, dtype):
    held, _ = make(storage, dtype)
    assert isinstance(held, GradientRows)
    assert held.num_rows == M
    assert held.dtype == jnp.float32
    assert held.layout.size == D


def test_dots(storage, dtype):
    held, matrix = make(storage, dtype)
    v = vector()
    oracles.assert_close(held.dots(tree_of(v)), matrix @ v, length=D)


def test_combine(storage, dtype):
    held, matrix = make(storage, dtype)
    c = vector(size=M)
    out = held.combine(jnp.asarray(c))
    assert jax.tree.structure(out) == jax.tree.structure(PARAMS)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))
    oracles.assert_close(oracles.flat(out), c @ matrix, length=M)


def test_gram(storage, dtype):
    held, matrix = make(storage, dtype)
    oracles.assert_close(held.gram(), matrix @ matrix.T, length=D)
    keep = vector() > 0
    kept = matrix * keep
    oracles.assert_close(held.gram(tree_of(keep, bool)), kept @ kept.T, length=D)


def test_restrict(storage, dtype):
    held, matrix = make(storage, dtype)
    keep = vector() > 0
    got = held.restrict(tree_of(keep, bool))
    np.testing.assert_array_equal(np.asarray(got.columns(0, D), np.float64), matrix * keep)


def test_transform(storage, dtype):
    held, matrix = make(storage, dtype)
    mixing = np.random.default_rng(2).normal(size=(2, M)).astype(np.float32)
    got = held.transform(jnp.asarray(mixing))
    assert isinstance(got, GradientRows)
    assert got.num_rows == 2
    assert got.dtype == jnp.float32
    oracles.assert_close(got.columns(0, D), mixing @ matrix, length=M)


def test_column_square_sums(storage, dtype):
    held, matrix = make(storage, dtype)
    oracles.assert_close(
        oracles.flat(held.column_square_sums()), np.sum(matrix**2, axis=0), length=M
    )
    mixing = np.random.default_rng(2).normal(size=(2, M)).astype(np.float32)
    got = held.column_square_sums(jnp.asarray(mixing))
    oracles.assert_close(oracles.flat(got), np.sum((mixing @ matrix) ** 2, axis=0), length=M)


def test_columns_across_the_borders_of_leaves(storage, dtype):
    held, matrix = make(storage, dtype)
    for start, size in ((0, D), (0, 1), (5, 3), (6, 1), (4, 10), (D - 1, 1)):
        got = held.columns(start, size)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(got, np.float64), matrix[:, start : start + size])


def test_take(storage, dtype):
    held, matrix = make(storage, dtype)
    at = np.array([18, 0, 6, 6, 7, 5])
    got = jax.jit(lambda held, at: held.take(at))(held, jnp.asarray(at))
    np.testing.assert_array_equal(np.asarray(got, np.float64), matrix[:, at])


def test_put(storage, dtype):
    held, matrix = make(storage, dtype)
    g = vector(3)
    put = jax.jit(lambda held, row, g: held.put(row, g))
    new, dots, accepted = put(held, jnp.int32(2), tree_of(g))
    assert accepted
    matrix[2] = stacked(tree_of(g, dtype), m=1)[0]
    np.testing.assert_array_equal(np.asarray(new.columns(0, D), np.float64), matrix)
    oracles.assert_close(dots, matrix @ matrix[2], length=D)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("leaf", ["s", "t"])
def test_put_refuses_what_cannot_be_squared(storage, bad, leaf):
    held, matrix = make(storage)
    g = tree_of(vector(3))
    g[leaf] = g[leaf].at[..., -1].set(bad) if g[leaf].ndim else jnp.float32(bad)
    new, _, accepted = held.put(jnp.int32(1), g)
    assert not accepted
    np.testing.assert_array_equal(np.asarray(new.columns(0, D), np.float64), matrix)


def test_put_refuses_what_overflows_the_storage(storage):
    held, matrix = make(storage, jnp.float16)
    new, _, accepted = held.put(jnp.int32(1), tree_of(np.full(D, 1e6)))
    assert not accepted
    np.testing.assert_array_equal(np.asarray(new.columns(0, D), np.float64), matrix)


def test_clear(storage):
    held, matrix = make(storage)
    matrix[1] = 0
    np.testing.assert_array_equal(held.clear(jnp.int32(1)).columns(0, D), matrix)


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
    held, matrix = make(storage, jnp.float64)
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


def test_rows_are_pytrees(storage):
    held, matrix = make(storage)
    same = jax.jit(lambda held: held)(held)
    assert jax.tree.structure(same) == jax.tree.structure(held)
    np.testing.assert_array_equal(same.columns(0, D), matrix)


def test_as_rows_takes_one_matrix_for_a_tree(storage):
    _, matrix = make(storage)
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
